"""Scripts on TorchRL's environments, collectors, modules, buffers, trainers learn the same after a change of import."""

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
from torchrl.objectives.utils import TargetNetUpdater  # noqa: E402
from torchrl.trainers.algorithms import DQNTrainer, PPOTrainer, SACTrainer  # noqa: E402


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


def learn(trainer, loss, collector, total_frames, **options):
    """Train by a ``trainer`` of TorchRL; the losses of each step."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    trainer = trainer(
        collector=collector,
        total_frames=total_frames,
        frame_skip=1,
        loss_module=loss,
        optimizer=optimizer,
        progress_bar=False,
        enable_logging=False,
        **options,
    )
    found = []

    def keep(_, losses):
        found.append({key: value.detach().clone() for key, value in losses.items() if key.startswith("loss")})
        return losses

    trainer.register_op("process_loss", keep)
    trainer.train()
    return found


def ppo_parts(losses, estimators):
    env = environment("CartPole-v1")
    actor = discrete_policy(TensorDictModule(MLP(4, 2, num_cells=[16]), ["observation"], ["logits"]), env)
    critic = ValueOperator(MLP(4, 1, num_cells=[16]), ["observation"])
    advantage = estimators.GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss = losses.ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, normalize_advantage=True)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), sampler=SamplerWithoutReplacement(), batch_size=32)
    return advantage, loss, buffer, Collector(env, actor, frames_per_batch=64, total_frames=192)


def ppo(losses, estimators):
    advantage, loss, buffer, collector = ppo_parts(losses, estimators)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for data in collector:
        for _ in range(2):
            with torch.no_grad():
                advantage(data)
            buffer.extend(data.reshape(-1))
            yield from [step(loss, batch, optimizer) for batch in buffer]


def ppo_by_trainer(losses, estimators):
    advantage, loss, buffer, collector = ppo_parts(losses, estimators)
    return learn(
        PPOTrainer, loss, collector, 192, replay_buffer=buffer, gae=advantage, num_epochs=2, optim_steps_per_batch=2
    )


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


def sac_parts(losses):
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
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(200), batch_size=32)
    return loss, buffer, Collector(env, actor, frames_per_batch=50, total_frames=200, init_random_frames=50)


def sac(losses, _):
    loss, buffer, collector = sac_parts(losses)
    updater = losses.SoftUpdate(loss, eps=0.9)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for data in collector:
        buffer.extend(data.reshape(-1))
        for _ in range(3):
            yield step(loss, buffer.sample(), optimizer)
            updater.step()


def sac_by_trainer(losses, _):
    class SoftUpdate(losses.SoftUpdate, TargetNetUpdater):  # trainers ask whether it is TorchRL's
        pass

    loss, buffer, collector = sac_parts(losses)
    updater = SoftUpdate(loss, eps=0.9)
    return learn(
        SACTrainer, loss, collector, 200, replay_buffer=buffer, target_net_updater=updater, optim_steps_per_batch=3
    )


def dqn_parts(losses):
    env = environment("CartPole-v1")
    actor = QValueActor(MLP(4, 2, num_cells=[16]), in_keys=["observation"], spec=env.action_spec)
    explorer = EGreedyModule(annealing_num_steps=100, spec=env.action_spec)
    loss = losses.DQNLoss(actor, loss_function="l2", double_dqn=True, delay_value=True)
    loss.make_value_estimator(gamma=0.97)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200), batch_size=32, transform=MultiStepTransform(n_steps=3, gamma=0.97)
    )
    collector = Collector(env, TensorDictSequential(actor, explorer), frames_per_batch=50, total_frames=200)
    return loss, explorer, buffer, collector


def dqn(losses, _):
    loss, explorer, buffer, collector = dqn_parts(losses)
    updater = losses.HardUpdate(loss, value_network_update_interval=4)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for data in collector:
        buffer.extend(data)
        explorer.step(data.numel())
        for _ in range(3):
            yield step(loss, buffer.sample(), optimizer)
            updater.step()


def dqn_by_trainer(losses, _):
    class HardUpdate(losses.HardUpdate, TargetNetUpdater):
        pass

    loss, explorer, buffer, collector = dqn_parts(losses)
    return learn(
        DQNTrainer,
        loss,
        collector,
        200,
        replay_buffer=buffer,
        target_net_updater=HardUpdate(loss, value_network_update_interval=4),
        greedy_module=explorer,
        optim_steps_per_batch=3,
    )


SCRIPTS = [ppo, ppo_by_trainer, recurrent_a2c, sac, sac_by_trainer, dqn, dqn_by_trainer]


@pytest.mark.filterwarnings("ignore:.*Trainer is an experimental", "ignore:.*replaced by OptimizationStepper")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_learns_the_same_after_a_change_of_import(script):
    found = []
    for modules in ((losses, estimators), (objectives, objectives_value)):
        torch.manual_seed(0)
        found.append(list(script(*modules)))
    assert len(found[0]) >= 4
    # In float32, and both learn from what they did: what differs in the last digit is differing more and more.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
