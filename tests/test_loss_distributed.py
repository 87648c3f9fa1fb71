"""Losses under DistributedDataParallel: gradients are the mean over the ranks, however backward is called."""

import os
import socket

import pytest
import torch
from fusedrl.losses import A2CLoss, ClipPPOLoss, ReinforceLoss
from helpers_losses import collect, critic, discrete_actor
from tensordict import TensorDictBase
from torch import distributed, nn
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed")

LOSSES = [A2CLoss, ClipPPOLoss, ReinforceLoss]
WAYS = ["sum", "each", "some"]
# float64, and a mean over two ranks
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def join(rank, world_size, port):
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", rank=rank, world_size=world_size, init_method=address)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def terms_of(out):
    return [x for name, x in out.items() if name.startswith("loss_")]


def backward(terms, way):
    if way == "sum":
        sum(terms).backward()
        return
    for term in terms if way == "each" else terms[:1]:
        term.backward(retain_graph=True)


def gradient(loss):
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in loss.parameters()])


@pytest.fixture(scope="module")
def process_group():
    join(0, 1, free_port())
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", LOSSES)
@pytest.mark.parametrize("estimated", [True, False])
def test_one_process_gets_the_gradients_it_gets_without_the_wrapper(process_group, cls, way, estimated):
    torch.manual_seed(0)
    loss = cls(discrete_actor(), critic())
    data = collect(discrete_actor(), estimated=estimated)
    expected = loss(data)
    backward(terms_of(expected), way)
    expected_gradient = gradient(loss)
    wrapped = DistributedDataParallel(loss, find_unused_parameters=True)
    for _ in range(2):  # the second pass finds what the first left behind
        loss.zero_grad()
        out = wrapped(data)
        assert isinstance(out, TensorDictBase)
        torch.testing.assert_close(out.to_dict(), expected.to_dict(), **CLOSE)
        backward(terms_of(out), way)
        torch.testing.assert_close(gradient(loss), expected_gradient, **CLOSE)


def test_other_settings_of_the_wrapper_are_left_alone(process_group):
    torch.manual_seed(0)
    loss = ReinforceLoss(discrete_actor(), critic())
    data = collect(discrete_actor())
    for options in ({}, {"static_graph": True}, {"static_graph": True, "find_unused_parameters": True}):
        wrapped = DistributedDataParallel(loss, **options)
        for _ in range(2):
            out = wrapped(data)
            assert isinstance(out, TensorDictBase)
            sum(terms_of(out)).backward()
    keywords = {"action": data["action"], "observation": data["observation"]}
    keywords |= {f"next_{key}": x for key, x in data["next"].items()}
    assert len(DistributedDataParallel(loss, find_unused_parameters=True)(**keywords)) == 2


def test_a_loss_inside_the_module_that_is_wrapped_returns_what_it_does_elsewhere(process_group):
    class Total(nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.loss = loss

        def forward(self, data):
            out = self.loss(data)
            assert isinstance(out, TensorDictBase)
            return sum(terms_of(out))

    torch.manual_seed(0)
    loss, data = A2CLoss(discrete_actor(), critic()), collect(discrete_actor())
    sum(terms_of(loss(data))).backward()
    expected = gradient(loss)
    loss.zero_grad()
    wrapped = DistributedDataParallel(Total(loss), find_unused_parameters=True)
    wrapped(data).backward()
    torch.testing.assert_close(gradient(loss), expected, **CLOSE)


def test_gradients_accumulate_without_synchronisation(process_group):
    torch.manual_seed(0)
    loss = A2CLoss(discrete_actor(), critic())
    data = collect(discrete_actor())
    sum(terms_of(loss(data))).backward()
    expected = 2 * gradient(loss)
    loss.zero_grad()
    wrapped = DistributedDataParallel(loss, find_unused_parameters=True)
    with wrapped.no_sync():
        sum(terms_of(wrapped(data))).backward()
    sum(terms_of(wrapped(data))).backward()
    torch.testing.assert_close(gradient(loss), expected, **CLOSE)


def _check_two_ranks(rank, port):
    torch.set_num_threads(1)
    join(rank, 2, port)
    for cls in LOSSES:
        for way in WAYS:
            torch.manual_seed(0)
            loss = cls(discrete_actor(), critic())
            torch.manual_seed(1 + rank)
            data = collect(discrete_actor())
            backward(terms_of(loss(data)), way)
            expected = gradient(loss)
            distributed.all_reduce(expected)
            wrapped = DistributedDataParallel(loss, find_unused_parameters=True)
            for _ in range(2):
                loss.zero_grad()
                backward(terms_of(wrapped(data)), way)
                torch.testing.assert_close(
                    gradient(loss), expected / 2, **CLOSE, msg=lambda m, case=(cls, way): f"{case}: {m}"
                )
    with wrapped.no_sync():
        loss.zero_grad()
        sum(terms_of(wrapped(data))).backward()
        summed = gradient(loss)
    loss.zero_grad()
    sum(terms_of(loss(data))).backward()
    torch.testing.assert_close(summed, gradient(loss), **CLOSE, msg="no_sync() shares gradients")
    distributed.barrier()
    # Gloo's threads may hold Python objects, for which they wait if they are joined by the thread that runs Python.
    os._exit(0)


def test_two_processes_share_the_mean_of_their_gradients():
    mp.spawn(_check_two_ranks, (free_port(),), nprocs=2)
