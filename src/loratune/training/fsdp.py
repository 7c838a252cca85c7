"""A base that several processes share (FSDP2): each keeps a part of every decoder layer, and all of one while it computes.

The adapter, the embeddings and the head stay whole in every process: the adapter because its gradients are added up as those of a
whole base are (`sharing`), so that a step is the same step; the others because the loss reads them outside of any module.

A layer is gathered by all processes together, or by none. So all of them call the model equally often: who has fewer micro-batches
calls it with `FILLER`, and nobody begins again in smaller ones, or gives up half-way, by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel

from loratune.data.examples import Example
from loratune.data.rows.conversation import Origin
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.training.layers import decoder_layers
from loratune.training.packing_support import decoder_of

FILLER = Example(
    input_ids=np.zeros(2, dtype=np.int32), supervised=np.array([False, True]), origin=Origin(file="filler", line=0)
)
"""Stands in a micro-batch that counts nothing."""


def is_sharded(recipe: Recipe) -> bool:
    """Whether the processes that work together now share the base."""
    return recipe.train.strategy == "fsdp" and processes.size() > 1


def shard_layers(model: PeftModel, device: str) -> None:
    """Give each process its part of the decoder layers' frozen weights, layer by layer, and move the rest to its device.

    Args:
        model: The adapted model, whole and with the same weights in each process.
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
    # It has nothing to shard itself; as the root it lets a layer arrive while the one before computes.
    fully_shard(decoder, mesh=mesh, ignored_params=(set(decoder.parameters()) - within) | trained)
    model.to(device)


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Where a layer cannot be gathered, another process is gone.

    Raises:
        LostError: It is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise processes.lost_peer_error() from error
        raise
