"""Scripts on TorchRL's environments, collectors, modules and buffers learn the same after a change of import."""

import pytest
import torch
from fusedrl import estimators, losses
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn

pytest.importorskip("gymnasium")
torchrl = pytest.importorskip("torchrl")

from torchrl import objectives  # noqa: E402  # after the check that it is there
from torchrl.collectors import Collector  # noqa: E402
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer  # noqa: E402
from torchrl.envs import (  # noqa: E402
    Compose,
    DoubleToFloat,
    GymEnv,
    InitTracker,
    MultiStepTransform,
    RewardSum,
    TransformedEnv,
)
from torchrl.modules import (  # noqa: E402
    MLP,
    ActorValueOperator,
    EGreedyModule,
    LSTMModule,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
    set_recurrent_mode,
)
from torchrl.objectives import value as objectives_value  # noqa: E402


def environment(name):
    env = TransformedEnv(GymEnv(name), Compose(DoubleToFloat(), RewardSum(), InitTracker()))
    env.set_seed(0)
    return env


def step(loss, data, optimizer):
    """One step of training; the losses."""
    found = {key: value for key, value in loss(data).items() if key.startswith("loss")}
    optimizer.zero_grad()
    sum(found.values()).backward()
    nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
    optimizer.step()
    return {key: value.detach() for key, value in found.items()}


def discrete_policy(module, env):
    return ProbabilisticActor(
        module, ["logits"], spec=env.action_spec, distribution_class=OneHotCategorical, return_log_prob=True
    )


def ppo(losses, estimators):
    env = environment("CartPole-v1")
    actor = discrete_policy(TensorDictModule(MLP(4, 2, num_cells=[16]), ["observation"], ["logits"]), env)
    critic = ValueOperator(MLP(4, 1, num_cells=[16]), ["observation"])
    advantage = estimators.GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss = losses.ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), sampler=SamplerWithoutReplacement(), batch_size=32)
    for data in Collector(env, actor, frames_per_batch=64, total_frames=192):
        for _ in range(2):
            with torch.no_grad():
                advantage(data)
            buffer.extend(data.reshape(-1))
            yield from [step(loss, batch, optimizer) for batch in buffer]


def recurrent_a2c(losses, estimators):
    env = environment("CartPole-v1")
    memory = LSTMModule(input_size=8, hidden_size=8, in_key="embedded", out_key="features")
    env.append_transform(memory.make_tensordict_primer())
    trunk = TensorDictSequential(TensorDictModule(nn.Linear(4, 8), ["observation"], ["embedded"]), memory)
    policy = discrete_policy(TensorDictModule(nn.Linear(8, 2), ["features"], ["logits"]), env)
    both = ActorValueOperator(trunk, policy, ValueOperator(nn.Linear(8, 1), ["features"]))
    actor, critic = both.get_policy_operator(), both.get_value_operator()
    advantage = estimators.GAE(gamma=0.99, lmbda=0.95, value_network=critic, deactivate_vmap=True)
    loss = losses.A2CLoss(actor, critic, entropy_coeff=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for data in Collector(env, actor, frames_per_batch=32, total_frames=128):
        with set_recurrent_mode(True):
            with torch.no_grad():
                advantage(data)
            yield step(loss, data, optimizer)


def sac(losses, _):
    env = environment("Pendulum-v1")
    network = nn.Sequential(MLP(3, 2, num_cells=[16]), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        ["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": env.action_spec.space.low, "high": env.action_spec.space.high},
    )
    qvalues = [ValueOperator(MLP(4, 1, num_cells=[16]), ["observation", "action"]) for _ in range(2)]
    loss = losses.SACLoss(actor, qvalues, action_spec=env.action_spec)
    loss.make_value_estimator(gamma=0.98)
    updater = losses.SoftUpdate(loss, eps=0.9)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(200), batch_size=32)
    for data in Collector(env, actor, frames_per_batch=50, total_frames=200, init_random_frames=50):
        buffer.extend(data.reshape(-1))
        for _ in range(3):
            yield step(loss, buffer.sample(), optimizer)
            updater.step()


def dqn(losses, _):
    env = environment("CartPole-v1")
    actor = QValueActor(MLP(4, 2, num_cells=[16]), in_keys=["observation"], spec=env.action_spec)
    explorer = EGreedyModule(annealing_num_steps=100, spec=env.action_spec)
    loss = losses.DQNLoss(actor, loss_function="l2", double_dqn=True, delay_value=True)
    loss.make_value_estimator(gamma=0.97)
    updater = losses.HardUpdate(loss, value_network_update_interval=4)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200), batch_size=32, transform=MultiStepTransform(n_steps=3, gamma=0.97)
    )
    for data in Collector(env, TensorDictSequential(actor, explorer), frames_per_batch=50, total_frames=200):
        buffer.extend(data)
        explorer.step(data.numel())
        for _ in range(3):
            yield step(loss, buffer.sample(), optimizer)
            updater.step()


@pytest.mark.parametrize("script", [ppo, recurrent_a2c, sac, dqn], ids=lambda script: script.__name__)
def test_a_script_learns_the_same_after_a_change_of_import(script):
    found = []
    for modules in ((losses, estimators), (objectives, objectives_value)):
        torch.manual_seed(0)
        found.append(list(script(*modules)))
    # In float32, and both learn from what they did: what differs in the last digit is differing more and more.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
