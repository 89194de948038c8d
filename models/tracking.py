"""Weights & Biases, with --track: it copies what TensorBoard gets, and gets the films of --capture-video."""
import dataclasses

from models.command_line import fail


def begin_tracking(args, folder):
    """wandb, which is optional. A resumed run continues as the same one."""
    try:
        import wandb

        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, id=folder.name, dir=folder.parent,
            resume="allow" if args.resume else "never", save_code=True, config=dataclasses.asdict(args),
            sync_tensorboard=True)
    except Exception as e:                              # not installed, not logged in, no network
        if not args.resume:
            folder.rmdir()
        fail(f"--track: {' '.join(str(e).split())}; pip install wandb, wandb login or "
             "WANDB_MODE=offline may help")
    return wandb
