"""FSDP2 (``trainer.strategy: fsdp2``): weights, gradients and optimizer states sharded over all devices.

Each block of the model gathers its weights before it runs and frees them afterwards; parameters outside of
blocks are gathered for the whole step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed import broadcast, new_group
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_map_only

from unimoe.errors import UserError
from unimoe.moe import Experts, MoELayer, Router
from unimoe.moe.parallel import Exchange, divide_experts

from .ranks import mean_over_ranks

META = "meta.pt"
"""The file of a sharded checkpoint that holds everything but tensors, named as in Lightning."""


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all processes, for modules whose ``configure_model`` calls
    :func:`shard`.

    A checkpoint is a folder with a file from each process, and resumes at any number of processes; those of
    other strategies are files, and resume here too.
    """

    def __init__(
        self,
        expert_parallel: int = 1,
        exchange: Exchange = "all_to_all",
        process_group_backend: str | None = None,
    ):
        """
        Args:
            expert_parallel: size of the groups of processes that share the experts of every MoE layer.
            exchange: with ``all_to_all`` each process has its own batch, and tokens are sent to their
                experts; with ``all_reduce`` a group has one batch, and the experts' outputs are summed.
            process_group_backend: of torch.distributed; None selects nccl on GPUs and gloo on CPUs.
        """
        super().__init__(process_group_backend=process_group_backend)
        self.expert_parallel = expert_parallel
        self.exchange: Exchange = exchange
        self._writers: Any = None
        """Process group of the writing threads, separate from that of training."""

    @property
    def ranks_per_batch(self) -> int:
        """Number of processes that share a batch."""
        return self.expert_parallel if self.exchange == "all_reduce" else 1

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        if self.world_size % self.expert_parallel:
            found = f"found {self.expert_parallel} and {self.world_size}"
            raise UserError(f"expert_parallel must divide the number of processes, {found}")
        self._tensor_parallel_size = self.expert_parallel
        self._data_parallel_size = self.world_size // self.expert_parallel

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Each process writes its shards, in the background inside :meth:`AnyCheckpoint.deferred`."""
        later = getattr(self.checkpoint_io, "later", None)
        if later is None:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        path = Path(self.broadcast(filepath))
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        for index, state in enumerate(checkpoint.pop("optimizer_states")):
            tensors[f"optimizer_{index}"] = state
        self._writers = self._writers or new_group(backend="gloo")
        saving: Any = async_save(tensors, checkpoint_id=path, process_group=self._writers)
        later.append(saving.result)
        if self.global_rank == 0:
            later.append(partial(_write, _copy(checkpoint), path / META))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the shards of model and optimizers.

        Returns:
            The rest of the checkpoint, and the loaded weights under ``state_dict``.
        """
        path, module = Path(self.broadcast(checkpoint_path)), self.lightning_module
        assert module is not None
        if path.is_file():
            return self._load_file(path, module, weights_only)
        trained = module.checkpoint_names()  # type: ignore[operator]
        weights = {name: t for name, t in get_model_state_dict(module).items() if name in trained}
        state: dict[str, Any] = {"state_dict": weights}
        for index, optimizer in enumerate(self.optimizers):
            state[f"optimizer_{index}"] = get_optimizer_state_dict(module, optimizer)
        load(state, checkpoint_id=path)
        set_model_state_dict(module, dict(weights), options=StateDictOptions(strict=False))  # it adds to them
        for index, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(module, optimizer, state[f"optimizer_{index}"])
        rest = torch.load(path / META, map_location="cpu", weights_only=weights_only)
        return {**rest, "state_dict": weights}

    def _load_file(self, path: Path, module: LightningModule, weights_only: bool | None) -> dict[str, Any]:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(module, dict(found["state_dict"]), options=whole)
        for optimizer, state in zip(self.optimizers, found["optimizer_states"], strict=True):
            set_optimizer_state_dict(module, optimizer, by_name(state, optimizer, module), options=whole)
        return found


class AnyCheckpoint(TorchCheckpointIO):
    """Reads checkpoint files, and the sharded folders of :class:`FSDP2Strategy` into one process.

    Inside :meth:`deferred`, writing is left to the caller, which may do it in a thread.
    """

    later: list[Callable[[], object]] | None = None
    """The writes that are left to the caller, inside ``deferred``."""

    @contextmanager
    def deferred(self) -> Iterator[list[Callable[[], object]]]:
        """Inside, checkpoints are copied to CPU memory; the list receives functions that write them."""
        self.later = writes = []
        try:
            yield writes
        finally:
            self.later = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        if self.later is None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        self.later.append(partial(_write, _copy(checkpoint), Path(path)))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args, **kwargs)
        found = _load_distributed_checkpoint(Path(path))
        shards = [found.pop(f"optimizer_{index}") for index in range(len(found["lr_schedulers"]))]
        return {**found, "optimizer_states": [by_number(state) for state in shards]}


def _copy(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # its errors are clearer than those of torch's own files
        torch.save(checkpoint, file)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all processes")


def by_name(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict with parameters keyed by their names in ``module`` instead of numbers."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return _renamed(state, dict(enumerate(names[parameter] for parameter in parameters)))


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`by_name`."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    return _renamed(state, {name: number for number, name in enumerate(names)})


def _renamed(state: dict[str, Any], new: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state dict with parameters renamed."""
    groups = [{**group, "params": [new[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[key]: values for key, values in state["state"].items()}, "param_groups": groups}


def shard(module: LightningModule, blocks: Iterable[nn.Module], whole: Sequence[nn.Module] = ()) -> None:
    """Shard a Lightning module's weights over the processes of its ``device_mesh``.

    Tensors on the meta device (on all ranks but 0, which has all weights) are broadcast by rank 0 one by one:
    only that rank needs memory for a whole model.

    Args:
        module: the module, its model built and what trains chosen. Its steps are registered as forward
            methods, for the parameters outside of ``blocks``.
        blocks: modules that every process calls equally often.
        whole: modules that every process keeps whole: frozen ones, which may run on one rank only.

    Raises:
        UserError: experts that other layers run as well, which sharding by block cannot gather.
    """
    strategy = module.trainer.strategy
    assert isinstance(strategy, FSDP2Strategy)
    for part in module.modules():
        if isinstance(part, Router | Experts) and part.linked:
            uses = "uses weights of other layers, which sharding gathers for their own block only"
            raise UserError(f"{type(part).__name__} {uses}; train with strategy ddp")
    mesh = strategy.device_mesh
    data = others = mesh["data_parallel"]
    policy = mixed_precision_policy(module.trainer.precision)
    frames = strategy.reduce_boolean_decision(any(p.is_meta for p in module.parameters()), all=False)
    kept = {parameter for part in whole for parameter in part.parameters()}
    state: dict[str, Any] = {}
    if frames and strategy.global_rank == 0:
        there = {name for name, parameter in module.named_parameters() if parameter in kept}
        state = {name: tensor for name, tensor in module.state_dict().items() if name not in there}
    if strategy.expert_parallel > 1:
        layers = [layer for layer in module.modules() if isinstance(layer, MoELayer)]
        for layer in layers:
            divide_experts(layer, mesh["tensor_parallel"], strategy.exchange)
        if strategy.exchange == "all_to_all":  # all else is shared by all processes
            others = mesh._flatten("all")
            for layer in layers:
                fully_shard(layer.experts, mesh=data, mp_policy=policy)
    for router in [part for part in module.modules() if isinstance(part, Router)]:
        fully_shard(router, mesh=others)  # in float32, whatever the precision of the rest
    numbers = {parameter for parameter in module.parameters() if parameter.ndim == 0}  # cannot be divided
    for block in blocks:
        fully_shard(block, mesh=others, mp_policy=policy, ignored_params=numbers)
    fully_shard(module, mesh=others, mp_policy=policy, ignored_params=kept | numbers)
    if frames:
        for part in whole:
            part.to(strategy.root_device)  # beside the shards
        sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(module, state, options=sent)
        broadcast_module(module, strategy.root_device, parameters=False)  # buffers that are in no state dict
    for parameter in module.parameters():
        if parameter.ndim == 0 and parameter.requires_grad:
            parameter.register_hook(mean_over_ranks)
    for step in ("training_step", "validation_step", "test_step"):
        register_fsdp_forward_method(module, step)


def mixed_precision_policy(precision: Any) -> MixedPrecisionPolicy:
    """The dtypes in which FSDP2 gathers weights under one of Lightning's precisions.

    Autocast alone would keep a half-precision copy of every weight until the backward pass.
    """
    half = torch.bfloat16 if precision == "bf16-mixed" else None
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)


def foreach(mesh: DeviceMesh | None) -> bool | None:
    """The ``foreach`` setting of optimizers on a module's ``device_mesh``.

    False under expert parallelism: experts are sharded differently from the rest and cannot be updated in one
    operation with it.
    """
    return None if mesh is None or mesh["tensor_parallel"].size() == 1 else False


@torch.no_grad()
def broadcast_module(module: nn.Module, device: torch.device, parameters: bool = True) -> None:
    """Materialise what is on the meta device with rank 0's values. Every rank must call it.

    Args:
        module: its buffers and, with ``parameters``, its parameters are broadcast.
        device: the device of the communication.
        parameters: False where parameters are sharded.
    """
    for owner in module.modules():
        tensors: dict[str, Tensor | None] = {**owner._buffers, **(owner._parameters if parameters else {})}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
            broadcast(value, 0)
            if tensor.is_meta:
                whole, trains = value.to("cpu"), tensor.requires_grad
                fresh = nn.Parameter(whole, trains) if isinstance(tensor, nn.Parameter) else whole
                setattr(owner, name, fresh)


@torch.no_grad()
def unshard(module: nn.Module) -> None:
    """Replace sharded parameters by whole ones on rank 0, and by empty ones elsewhere.

    Every rank must call it. Afterwards the module can only be saved, not run.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for owner, name, parameter in list(_parameters(module)):
        if not isinstance(parameter, DTensor):
            continue
        if parameter not in whole:
            full = parameter.full_tensor()
            full = full.cpu() if first else full.new_empty(0)
            whole[parameter] = nn.Parameter(full, parameter.requires_grad)
        owner._parameters[name] = whole[parameter]


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every owner and name of a parameter; tied parameters have several."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, name, parameter


def clip_norm(parameters: Iterable[Tensor], largest: float) -> None:
    """Clip the gradients of sharded and whole parameters together to a norm of at most ``largest``."""
    meshes: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            meshes.setdefault(mesh, []).append(parameter)
    norms = [get_total_norm([p.grad for p in own if p.grad is not None]) for own in meshes.values()]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for own in meshes.values():
        clip_grads_with_norm_(own, largest, total)


def check_deepspeed(strategy: Any) -> None:
    """Raises UserError where ``strategy``, as in the settings, is DeepSpeed's and cannot run here."""
    if not str(strategy).startswith("deepspeed"):
        return
    if find_spec("deepspeed") is None:
        raise UserError(f"trainer.strategy {strategy} needs an extra: pip install 'unimoe[deepspeed]'")
    if "stage_3" in str(strategy):
        raise UserError(f"trainer.strategy {strategy} leaves no whole weights to be saved; set fsdp2")
    if not torch.cuda.is_available():
        raise UserError(f"trainer.strategy {strategy} runs on CUDA devices only; set fsdp2 or ddp")
