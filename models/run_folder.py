"""The folder of a run: what is written there, and nothing about how an algorithm learns.

    args.json           the flags
    progress.csv        one row a log step, the same numbers as TensorBoard's events
    model.safetensors   the agent's weights, with the flags in its metadata: what --model plays
    checkpoint.pt       all that --resume needs: what the script saves, random generators, our own tasks
    videos/             with --capture-video one episode with every checkpoint
"""
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import safetensors.torch
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from models.command_line import RUNNING
from models.files import lock, refused_if_the_disk_does, rows_until, write
from models.flags import fail, pick_device, refused_in_one_sentence
from models.loading import LAYOUT
from models.tracking import begin_tracking
from models.views import Whitened

LAPS = "policy", "env", "batch", "update", "log"  # what the time of a run is spent on
NETWORK = (  # flags that its sizes depend on
    "env_id", "env_kwargs", "shrink_images", "memory", "hidden_size", "num_layers", "memory_kwargs",
    "encoder_size", "whiten_images", "mlp_size", "prev_action", "prev_reward", "norm_obs", "shared_encoder")
COMPARED = (  # between runs, in TensorBoard
    "eval/episodic_return", "eval/success", "charts/episodic_return", "charts/success")
SHOWN = {"SPS": "charts/SPS", "return": "charts/episodic_return", "success": "charts/success"}


class Run:
    """Logs, saves and is interrupted.   saved: the checkpoint that the run continues, {} for a new run"""

    def __init__(self, args, script, saved):
        default = f"{args.env_id}__{script}__{args.seed}__{int(1000 * time.time())}"
        name = args.run_name or re.sub("[/:]", "-", default)
        self.script, self.folder = script, Path(args.resume or Path(args.runs_dir) / name)
        flags = {"script": script, **dataclasses.asdict(args), "resume": None}
        self.args = json.dumps(flags, indent=2)
        self.last_step, self.seconds = (saved["global_step"], saved["seconds"]) if saved else (0, 0.0)
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(args.resume))
        except (OSError, ValueError) as e:                  # ValueError: a null byte in its name
            why = getattr(e, "strerror", e)
            fail(f"--run-name {name} cannot be made in --runs-dir {args.runs_dir} ({why}); "
                 f"choose another or --resume {self.folder}")
        self.lock = lock(self.folder)
        self.keeps_folder = bool(args.resume)               # from the first gradient step on
        self.wandb = begin_tracking(args, self.folder) if args.track else None
        self.log_short_runs(args)
        write(self.folder / "args.json", lambda path: path.write_text(self.args))
        self.progress, self.columns = self.folder / "progress.csv", None
        if self.progress.exists():                          # rows after the checkpoint will be made again
            kept = rows_until(self.last_step, self.progress.read_text())
            self.columns = next(csv.reader(kept[:1]), None)  # an older version's stay as they are
            write(self.progress, lambda path: path.write_text("".join(kept)))
        self.writer = SummaryWriter(self.folder, purge_step=self.last_step + 1)
        self.writer.add_text("args", f"```\n{self.args}\n```")
        self.end_of_flags = self.log_flags(args)
        self.bar = tqdm(
            total=args.total_timesteps, initial=self.last_step, unit="step", dynamic_ncols=True)
        self.clock, self.spent = time.perf_counter(), dict.fromkeys(LAPS, 0.0)
        self.learning_starts = getattr(args, "learning_starts", 0)
        self.interrupted, self.handlers_before = False, {}
        if threading.current_thread() is threading.main_thread():               # others get no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers_before[number] = signal.signal(number, self.on_signal)
        RUNNING[:] = [self]

    def log_short_runs(self, args):
        """Off-policy runs of fewer than --log-every steps get one row, of their last step."""
        if hasattr(args, "log_every"):
            steps = max(1, args.train_every // args.num_envs) * args.num_envs
            args.log_every = min(args.log_every, args.total_timesteps // steps * steps)

    def log_flags(self, args):
        """TensorBoard's tab HPARAMS: the flags of all runs beside the newest values of these metrics.

        In this run's own events, where add_hparams would begin a second run. Returns the mark of the end.
        """
        flags = {name: value if isinstance(value, (int, float, str)) else json.dumps(value)
                 for name, value in dataclasses.asdict(args).items()}
        *begin, end = hparams(flags, dict.fromkeys(COMPARED))
        for summary in begin:
            self.writer.file_writer.add_summary(summary)
        return end

    def send_film(self, path):
        if self.wandb:
            video = self.wandb.Video(str(path), format="gif")
            self.wandb.log({"videos/episode": video, "global_step": int(path.stem)})

    def on_signal(self, number, _):
        self.interrupted = True
        signal.signal(number, self.handlers_before[number])     # another kind is no second one
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        tqdm.write(f"{name}: finishing this update, then saving; a second {name} leaves at once")

    def restore_handlers(self):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def lap(self, name):
        """The time since the last lap was spent on this."""
        now = time.perf_counter()
        self.spent[name] += now - self.clock
        self.clock = now

    def passed(self, every, global_step, steps):
        """Whether the last `steps` steps passed a multiple of `every`.   every: 0 is never"""
        return every and global_step // every > (global_step - steps) // every

    def log(self, global_step, row):
        """Writes one row, nan for what was not measured, with the speed and what the time was spent on."""
        took = sum(self.spent.values())
        self.seconds += took
        row = {**row, "charts/SPS": (global_step - self.last_step) / took}
        row |= {f"time/{name}": value for name, value in self.spent.items()}
        self.warn_without_gradient_steps(global_step, row)
        self.keeps_folder |= row.get("charts/gradient_steps") != 0
        cells = {tag: "" if value != value else f"{value:.6g}" for tag, value in row.items()}
        cells = {"global_step": global_step, "seconds": f"{self.seconds:.3f}", **cells}
        with refused_if_the_disk_does(self.progress), self.progress.open("a", newline="") as f:
            table = csv.DictWriter(
                f, self.columns or list(cells), extrasaction="ignore", lineterminator="\n")
            if f.tell() == 0:
                table.writeheader()
            table.writerow(cells)
        measured = {tag: value for tag, value in row.items() if value == value}
        for tag, value in measured.items():
            self.writer.add_scalar(tag, value, global_step)
        shown = {name: f"{measured[tag]:.2f}" for name, tag in SHOWN.items() if tag in measured}
        self.bar.set_postfix(shown)
        self.bar.update(global_step - self.last_step)
        self.last_step, self.spent = global_step, dict.fromkeys(LAPS, 0.0)

    def warn_without_gradient_steps(self, global_step, row):
        no_episode = math.isnan(row["charts/episodic_length"])
        no_step = row.get("charts/gradient_steps") == 0
        if no_episode and no_step and self.learning_starts < global_step:
            tqdm.write(f"warning: no episode has ended, no gradient step was made until step {global_step}; "
                       """give the task a limit, as --env-kwargs '{"max_episode_steps": 1000}'""")

    def save(self, agent, envs, global_step, **everything):
        """A model to play and a checkpoint to resume.   everything: what the script needs to continue"""
        metadata = {
            "script": self.script, "layout": LAYOUT, "args": self.args, "global_step": str(global_step),
            "torch": str(torch.__version__), "gymnasium": gym.__version__,
            "observation_space": str(envs.single_observation_space),
            "action_space": str(envs.single_action_space)}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint = {
            **metadata, "global_step": global_step, "seconds": self.seconds,
            "agent": agent.state_dict(), "envs": envs.state_dict(),
            "rng": (torch.get_rng_state(), cuda), **everything}
        weights, save_file = agent.state_dict(), safetensors.torch.save_file
        write(self.folder / "model.safetensors", lambda path: save_file(weights, path, metadata))
        write(self.folder / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
        self.saved_step = global_step
        self.keeps_folder |= global_step > 0 and everything.get("gradient_steps") != 0

    def stop_if_not_finite(self, loss, global_step):
        """A loss of nan or inf ends the run; the last checkpoint is from before."""
        if not math.isfinite(loss):
            self.bar.close()
            sys.exit(f"the loss is not finite at step {global_step}; the last checkpoint is "
                     f"{self.folder}/checkpoint.pt: try --resume {self.folder} with a smaller learning rate "
                     "or --max-grad-norm")

    def watch_first_logratio(self, first_logratio, what="log-probabilities"):
        """PPO: before its first gradient step the policy in training must be the one that acted."""
        if first_logratio > 1e-3:
            tqdm.write(f"warning: {what} differ by {first_logratio:.1e} before the update's first "
                       "gradient step: the policy in training is not the one that acted")

    def watch_first_q_difference(self, first_q_difference):
        """PQN: the same of its action values."""
        self.watch_first_logratio(first_q_difference, "action values")

    def close(self):
        RUNNING.clear()
        self.restore_handlers()
        os.close(self.lock)
        self.bar.close()
        self.writer.file_writer.add_summary(self.end_of_flags)
        self.writer.close()

    def abandon(self):
        """Bad input that only the run has shown, as episodes that do not fit the replay."""
        self.close()
        if not self.keeps_folder:
            shutil.rmtree(self.folder)

    def finish(self):
        self.close()
        how = "interrupted" if self.interrupted else "done"
        print(f"{how} at step {self.saved_step}; everything is in {self.folder}")
        if self.interrupted:
            print(f"continue:  python {self.script}.py --resume {self.folder}")
        print(f"watch it:  python {self.script}.py --model {self.folder / 'model.safetensors'}")
        return self.folder


def restore_random_generators(saved):
    cpu, cuda = saved["rng"]
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda[:torch.cuda.device_count()])


def make_agent(Agent, args, envs, saved):
    """The agent for this task on its device, with the saved weights if there are any."""
    device = pick_device(args.device)
    memory_kwargs = json.dumps(args.memory_kwargs)
    what = (f"--env-id {args.env_id} with --memory {args.memory}, --hidden-size {args.hidden_size} and "
            f"--memory-kwargs {memory_kwargs}")
    with refused_in_one_sentence(what):
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
        for part in agent.modules():
            if hasattr(part, "encoder") and hasattr(part, "memory"):
                remember_one_step(part.memory, part.encoder.out_size, device)
    if saved:
        load_weights(agent, saved, args)
    elif any(isinstance(part, Whitened) and not part.numbered for part in agent.modules()):
        fail("--whiten-images can be trained on numbered pictures (Views) only, such as MinigridMemory-v0's; "
             "leave it out")
    return agent, device


@torch.no_grad()
def remember_one_step(memory, input_size, device):
    """Wrong sizes show before a run exists."""
    x, start = torch.zeros(1, 1, input_size, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    y, state = memory(x, memory.initial_state(1), start)
    if not all(s.numel() for s in state):
        raise ValueError("these sizes leave no memory: raise them")
    if not all(s.isfinite().all() for s in (y, *state)):
        raise ValueError("the memory's first outputs are not finite: leave its numbers out")


def load_weights(agent, saved, args):
    own, weights = agent.state_dict(), saved["agent"]
    if own.keys() != weights.keys():
        names = ", ".join(sorted(own.keys() ^ weights.keys())[:3])
        older = saved.get("layout") != LAYOUT
        why = "it was made by an older version" if older else what_differs(saved, args)
        fail(f"the saved network has other parts than the flags ask for ({names}): {why}")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            sizes = f"{name} is {list(weight.shape)} in the file, {list(own[name].shape)} here"
            fail(f"the saved network has other sizes than the flags and the task ask for ({sizes}): "
                 f"{what_differs(saved, args)}")
    agent.load_state_dict(weights)


def what_differs(saved, args):
    """The flags that make another network than the saved one."""
    asked = {name: getattr(args, name) for name in NETWORK if hasattr(args, name)}
    before = json.loads(saved["args"])
    changed = [
        f"--{name.replace('_', '-')} {json.dumps(value)} (saved: {json.dumps(before[name])})"
        for name, value in asked.items() if name in before and before[name] != value]
    return f"leave out {', '.join(changed)}" if changed else "the task has changed since then"
