"""A stand-in accelerator: device mistakes show on a machine without a GPU.

    with StandIn() as stand_in:
        x = torch.zeros(3, device=stand_in.type)    x.device is lazy:0
        x + torch.zeros(3)                          raises, as it would on a GPU
        x.numpy()                                   raises
        stand_in.waits                              where Python waited for a number of the device

Its tensors are shells. Each holds a CPU tensor, in which the numbers are, so that whatever depends on
numbers runs as it does on a GPU. torch has the name "lazy" for a kind of device that this build lacks.
Autograd runs it in the CPU's thread, and no layer of torch has code of its own for it.
"""
import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
OURS = ROOT, ROOT / "models", ROOT / "envs"
DEVICE = torch.device("lazy:0")
aten = torch.ops.aten
OPTIMIZER = sys.modules["torch.optim.optimizer"]          # torch.optim hides it
# Whatever gives Python a number, or a tensor whose size depends on numbers. Others: see `waits`.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select",
           "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Shell(torch.Tensor):
    """A tensor that is said to be on the accelerator.   inside: the CPU tensor with its numbers"""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, inside):
        shell = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, inside.stride(), inside.storage_offset(), dtype=inside.dtype, device=DEVICE)
        shell.inside = inside
        return shell

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    def numpy(self, **kwargs):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        """In files it is a CPU tensor: scripts load them onto the CPU."""
        return self.cpu().__reduce_ex__(protocol)


class StandIn(TorchDispatchMode):
    """waits: {callers(): how often}, where a script or what it imports waited for the device.

    Not what autograd waits for: the gradient of x[mask] waits as x[mask] does. Nor copies to the device.
    """

    type = DEVICE.type                                      # as a torch.device has it

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.patches = contextlib.ExitStack()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(op, args, kwargs):
            self.waits[callers()] += 1
        return run(op, args, kwargs)

    def __enter__(self):
        # torch.as_tensor(x, device=device): a CPU tensor first, which is then seen moving.
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        fused = OPTIMIZER._get_fused_kernels_supported_devices()
        save_file = safetensors.torch.save_file
        for owner, name, function in [
            (OPTIMIZER, "_get_fused_kernels_supported_devices", lambda: [*fused, DEVICE.type]),
            (torch, "inference_mode", lambda mode=True: torch.no_grad()),   # shells do not know it
            # It looks for a tensor's memory, and shells have none.
            (safetensors.torch, "save_file", lambda tensors, *args: save_file(on_cpu(tensors), *args)),
        ]:
            self.patches.enter_context(mock.patch.object(owner, name, function))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        torch._C._set_only_lift_cpu_tensors(self.lifted)
        return super().__exit__(*error)


def run(op, args, kwargs):
    """op on the numbers inside. Its results are shells if they are on the accelerator."""
    given = [*args, *kwargs.values()]
    shells = [x for x in tensors_in(given) if isinstance(x, Shell)]
    if shells:
        refuse_two_devices(op, args, kwargs)
    target = target_of(given)
    to_device = bool(shells) if target is None else target.type == DEVICE.type
    if not shells and not to_device:
        return op(*args, **kwargs)
    if op is aten._fused_sdp_choice.default:
        return 0                                            # the formula: fused kernels are the CPU's
    result = op(*inside(args), **{name: inside(x) for name, x in kwargs.items()})
    written = changed(op, args, kwargs)
    if written:                                             # in place, or out=
        return None if result is None else written[0] if len(written) == 1 else written
    return outside(result) if to_device else result


def refuse_two_devices(op, args, kwargs):
    """The rules of a GPU. The CPU's single numbers may take part, and so may its integers as indices."""
    name, given = op.overloadpacket.__name__, [*args, *kwargs.values()]
    if name == "copy_":
        return
    if name in INDEXING and isinstance(args[0], Shell):
        given = [x for x in given if x is not args[1]]
    written = [id(x) for x in changed(op, args, kwargs)]
    takes_numbers = torch.Tag.pointwise in op.tags or name in INDEXING | {"fill_", "masked_fill_"}
    for x in tensors_in(given):
        is_number = x.dim() == 0 and id(x) not in written
        if not isinstance(x, Shell) and not (is_number and takes_numbers):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two, "
                               f"{DEVICE} and cpu: {op}")


def waits(op, args, kwargs):
    """Whether Python waits here until the accelerator has computed something."""
    given = [*args, *kwargs.values()]
    in_backward = torch._C._current_graph_task_id() != -1
    if in_backward or not any(isinstance(x, Shell) for x in tensors_in(given)):
        return False
    name, target = op.overloadpacket.__name__, target_of(given)
    to_cpu = target is not None and target.type == "cpu"
    by_mask = name in INDEXING and any(x.dtype == torch.bool for x in tensors_in(args[1]))
    return to_cpu or by_mask or name in WAITING or (name == "copy_" and not isinstance(args[0], Shell))


def callers():
    """The lines of this project that called this, innermost first: ((file, function, line), ...)."""
    frame, found = sys._getframe(), []
    while frame is not None:
        code = frame.f_code
        if Path(code.co_filename).parent in OURS:           # a virtual environment may lie in the repository
            found.append((code.co_filename, code.co_name, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def tensors_in(tree):
    for x in tree:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(x)


def target_of(given):
    return next((x for x in given if isinstance(x, torch.device)), None)


def inside(x):
    if isinstance(x, Shell):
        return x.inside
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return type(x)(map(inside, x)) if isinstance(x, (list, tuple)) else x


def outside(x):
    if isinstance(x, torch.Tensor):
        return Shell(x)
    return type(x)(map(outside, x)) if isinstance(x, (list, tuple)) else x


def changed(op, args, kwargs):
    """The arguments that op changes and returns."""
    found = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.is_write:
            found.append(args[i] if i < len(args) else kwargs[argument.name])
    return found


def on_cpu(tensors):
    return {name: x.cpu() for name, x in tensors.items()}
