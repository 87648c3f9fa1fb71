"""The categorical loss against TorchRL's DistributionalDQNLoss, fed with stored log-probabilities.

TorchRL takes float32 in one batch dimension of 2 samples or more, and always chooses the next action by the online
network. It reads no NaN of terminal steps well, so there are none here.
"""

import pytest
import torch
from fusedrl.kernels import categorical_q_loss
from fusedrl.losses.distributional_dqn import DistributionalDQNLoss as OurLoss
from helpers_categorical import problem
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

torchrl = pytest.importorskip("torchrl")
from torchrl.modules import DistributionalQValueActor  # noqa: E402  torchrl may be absent
from torchrl.objectives import DistributionalDQNLoss  # noqa: E402

# float32 on both sides, which share out mass in their own order: some ten roundings of a loss around 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Stored(torch.nn.Module):
    """Log-probabilities from the data; the parameter tells the online network (1) from the target (0)."""

    def __init__(self) -> None:
        super().__init__()
        self.online = torch.nn.Parameter(torch.ones(()))

    def forward(self, online, target):
        return torch.where(self.online > 0, online, target)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (-1.0, 3.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize(("atoms", "actions"), [(51, 6), (5, 2)])
def test_loss_priority_and_gradient_are_those_of_torchrl(backend, device, gamma, bounds, atoms, actions) -> None:
    batch = (8,)
    arguments = problem(batch, atoms, actions, v_min=bounds[0], v_max=bounds[1], dtype=torch.float32, device=device)
    arguments["gamma"] = gamma
    ended = arguments["terminated"].unsqueeze(-1)
    data = TensorDict(
        {
            "log_prob": arguments["log_prob"],
            "stored": arguments["log_prob"].detach(),
            "action": arguments["action"],
            "next": {
                "log_prob": arguments["next_online_log_prob"],
                "stored": arguments["next_log_prob"],
                "reward": arguments["reward"].unsqueeze(-1),
                "done": ended,
                "terminated": ended,
            },
        },
        batch_size=batch,
    ).cpu()  # where the peer projects, whatever the data's device
    network = DistributionalQValueActor(
        TensorDictModule(Stored(), in_keys=["log_prob", "stored"], out_keys=["action_value"]),
        support=arguments["support"].cpu(),
        action_space="categorical",
        make_log_softmax=False,
    )
    module = DistributionalDQNLoss(network, gamma=gamma, reduction="none")
    module.target_value_network_params["module", "0", "module", "online"].zero_()
    expected = module(data)["loss"].reshape(batch).to(device)

    loss, priority = categorical_q_loss(**arguments, backend=backend)
    assert torch.allclose(loss, expected, **CLOSE)
    assert torch.allclose(priority, data["td_error"].reshape(batch).to(device), **CLOSE)
    weight = torch.arange(8.0, device=device)
    found, wanted = (torch.autograd.grad((weight * x).sum(), arguments["log_prob"])[0] for x in (loss, expected))
    assert torch.allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
def test_the_module_that_only_chooses_an_action_is_not_run_for_the_loss(monkeypatch, device, masked) -> None:
    """The operator chooses; but a module that masks actions changes what it chooses from."""
    network = DistributionalQValueActor(
        TensorDictModule(torch.nn.Identity(), in_keys=["log_prob"], out_keys=["action_value"]),
        support=torch.linspace(-2, 3, 5, device=device),
        action_space="categorical",
        make_log_softmax=False,
        action_mask_key="mask" if masked else None,
    )
    calls = []
    chooser = type(network[-1])
    original = chooser.forward
    monkeypatch.setattr(chooser, "forward", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    arguments = problem(dtype=torch.float32, device=device)
    ended = arguments["terminated"].unsqueeze(-1)
    entries = {"log_prob": arguments["log_prob"], "mask": torch.ones(4, 1, 3, dtype=torch.bool, device=device)}
    following = {"reward": arguments["reward"].unsqueeze(-1), "done": ended, "terminated": ended}
    following |= entries | {"log_prob": arguments["next_log_prob"]}
    data = TensorDict({**entries, "action": arguments["action"], "next": following}, [4])
    loss = OurLoss(network, gamma=0.9, reduction="none")(data)["loss"]
    expected, _ = categorical_q_loss(**arguments | {"next_online_log_prob": None}, backend="torch")
    assert bool(calls) == masked
    if not masked:
        assert torch.allclose(loss.reshape(4), expected)
