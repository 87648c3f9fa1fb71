"""Dreamer's losses under DistributedDataParallel: the wrapper finds the parameters in a pair of TensorDicts too."""

import os

import pytest
import torch
from fusedrl.losses.dreamer import DreamerActorLoss, DreamerModelLoss, DreamerValueLoss
from helpers_dreamer import Imagination, actor_model, imagined, sequences, value_model, world_model
from tensordict import TensorDictBase
from test_loss_distributed import CLOSE, WAYS, backward, free_port, gradient, join, terms_of
from torch import distributed
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed")

CASES = {
    "model": (lambda: DreamerModelLoss(world_model(), free_nats=0.5), sequences),
    "actor": (
        lambda: DreamerActorLoss(actor_model(), value_model(), Imagination(), imagination_horizon=2),
        lambda: sequences((4,)).select("state", "belief"),
    ),
    "value": (lambda: DreamerValueLoss(value_model()), imagined),
}


def _check_two_ranks(rank, port):
    torch.set_num_threads(1)
    join(rank, 2, port)
    for name, (make, collect) in CASES.items():
        for way in WAYS:
            torch.manual_seed(0)
            loss = make()
            torch.manual_seed(1 + rank)
            data = collect()
            torch.manual_seed(3 + rank)  # the imagination draws
            backward(terms_of(loss(data)[0]), way)
            expected = gradient(loss)
            distributed.all_reduce(expected)
            wrapped = DistributedDataParallel(loss, find_unused_parameters=True)
            for _ in range(2):
                loss.zero_grad()
                torch.manual_seed(3 + rank)
                losses, found = wrapped(data)
                assert isinstance(losses, TensorDictBase)
                assert isinstance(found, TensorDictBase)
                backward(terms_of(losses), way)
                torch.testing.assert_close(
                    gradient(loss), expected / 2, **CLOSE, msg=lambda m, case=(name, way): f"{case}: {m}"
                )
    distributed.barrier()
    # Gloo's threads may hold Python objects, for which they wait if they are joined by the thread that runs Python.
    os._exit(0)


def test_two_processes_share_the_mean_of_their_gradients():
    mp.spawn(_check_two_ranks, (free_port(),), nprocs=2)
