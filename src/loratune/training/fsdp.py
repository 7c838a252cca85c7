"""A base sharded over several ranks (FSDP2): each holds a part of every decoder layer, and gathers a full layer to
compute it.

Every rank holds all of the adapter, the embeddings and the output head: the adapter because its gradients are summed as
without sharding (`gradient_sync`), so that a step stays the same step; the others because the loss reads their weights
outside of any module's forward.

Gathering a layer needs all ranks. So all of them must call the model equally often: a rank with fewer micro-batches
calls it with `data.batch.FILLER`, and none may restart with smaller micro-batches, or give up halfway, on its own.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from loratune.run import processes
from loratune.training.layers import decoder_layers
from loratune.training.packing_support import decoder_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel

    from loratune.recipe.recipe import Recipe


def is_sharded(recipe: Recipe) -> bool:
    """Tell whether the ranks running now share the base."""
    return recipe.train.strategy == "fsdp" and processes.size() > 1


def shard_layers(model: PeftModel, device: str) -> None:
    """Shard the frozen weights of the decoder layers over the ranks, layer by layer, and move the rest to the device.

    Args:
        model: The adapted model, unsharded and with the same weights on each rank.
        device: cpu or cuda.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (processes.size(),))
    layers = decoder_layers(model)
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained & set(layer.parameters()))
    within = {weight for layer in layers for weight in layer.parameters()}
    decoder: torch.nn.Module = decoder_of(model.get_base_model())
    # The decoder has nothing left to shard; as FSDP's root it prefetches a layer while the one before computes.
    fully_shard(decoder, mesh=mesh, ignored_params=(set(decoder.parameters()) - within) | trained)
    model.to(device)


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Report a failure to gather a layer as what it means: another rank is gone.

    Raises:
        LostPeerError: A collective operation failed.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise processes.lost_peer_error() from error
        raise
