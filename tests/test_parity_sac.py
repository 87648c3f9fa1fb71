"""SAC, its discrete form and REDQ give TorchRL's losses, gradients, priorities and checkpoints.

Where TorchRL goes another way on purpose of ours, the test that says so is in the file of the loss.
"""

import pytest
import torch

torchrl = pytest.importorskip("torchrl")

import torchrl.objectives as theirs  # noqa: E402  # after the check that it is there
from fusedrl.losses.discrete_sac import DiscreteSACLoss  # noqa: E402
from fusedrl.losses.redq import REDQLoss  # noqa: E402
from fusedrl.losses.sac import SACLoss  # noqa: E402
from helpers_q import (  # noqa: E402
    ACTION,
    OBSERVATION,
    LocScale,
    assert_parity,
    assert_states_are_exchanged,
    desynchronise_targets,
    qvalue_network,
    run,
    transitions,
    value_network,
)
from helpers_sac import discrete_sac, redq, sac, sac_with_value  # noqa: E402
from tensordict.nn import TensorDictModule, TensorDictSequential  # noqa: E402
from torch import nn  # noqa: E402
from torchrl.data import Bounded, Categorical, Composite, OneHot  # noqa: E402
from torchrl.modules import (  # noqa: E402
    MaskedCategorical,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)

PAIRS = {
    "sac": (sac, SACLoss, theirs.SACLoss),
    "sac_with_value": (sac_with_value, SACLoss, theirs.SACLoss),
    "redq": (redq, REDQLoss, theirs.REDQLoss),
    "discrete_sac": (discrete_sac, DiscreteSACLoss, theirs.DiscreteSACLoss),
}
every_loss = pytest.mark.parametrize("name", PAIRS)
# 6 rows: TorchRL's SAC with a value network takes only batches that are a multiple of the ensemble.
BATCH = (6, 3)

OPTIONS = [
    {},
    {"loss_function": "l2"},
    {"loss_function": "l1"},
    {"num_qvalue_nets": 3},
    {"num_qvalue_nets": 1},
    {"alpha_init": 0.3},
    {"alpha_init": 0.3, "fixed_alpha": True},
    {"min_alpha": 2.0, "max_alpha": 3.0},
    {"alpha_init": 4.0, "min_alpha": 0.5, "max_alpha": 3.0},
    {"target_entropy": 0.5},
    {"delay_qvalue": False},
    {"separate_losses": True},
    {"reduction": "sum"},
    {"reduction": "none", "scalar_output_mode": "exclude"},
    {"deactivate_vmap": True},
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(name, **options):
    make, *classes = PAIRS[name]
    ours, other = (make(cls, **options) for cls in classes)
    assert other.target_entropy is not None  # TorchRL's REDQ makes that buffer when it's first asked for
    other.load_state_dict(ours.state_dict())
    desynchronise_targets(ours, other)
    return ours, other


def data_of(name, batch=BATCH):
    return transitions(batch, "categorical" if name == "discrete_sac" else "continuous")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
@every_loss
def test_every_option_agrees(name, options):
    assert_parity(*pair(name, **options), data_of(name))


@pytest.mark.parametrize("options", [{"delay_value": False}, {"delay_actor": True}], ids=str)
def test_options_of_the_value_network_agree(options):
    assert_parity(*pair("sac_with_value", **options), data_of("sac"))


@pytest.mark.parametrize("size", [1, 3])
def test_subsets_of_every_size_agree(size):
    assert_parity(*pair("redq", sub_sample_len=size), data_of("redq"))


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
@every_loss
def test_every_estimator_agrees(name, estimator):
    ours, other = pair(name)
    ours.make_value_estimator(estimator, gamma=0.9)
    other.make_value_estimator(getattr(theirs.ValueEstimators, estimator), gamma=0.9)
    data = data_of(name)
    data["next", "done"] |= data["next", "terminated"]
    assert_parity(ours, other, data)


@every_loss
def test_importance_weights_agree(name):
    if name == "redq":
        pytest.skip("TorchRL's knows no importance weights")
    data = data_of(name)
    data["priority_weight"] = torch.rand(BATCH, dtype=torch.float64)
    for options in ({}, {"reduction": "none", "scalar_output_mode": "exclude"}, {"use_prioritized_weights": False}):
        assert_parity(*pair(name, **options), data)


@every_loss
def test_checkpoints_are_exchanged(name):
    options = {"min_alpha": 0.1, "max_alpha": 10.0}
    ours, other = pair(name, **options)
    assert_states_are_exchanged(ours, other)
    for loss in (ours, other):
        run(loss, data_of(name))
    assert_states_are_exchanged(ours, other)  # now with the hyperparameters of the estimator


@every_loss
def test_a_checkpoint_of_a_loss_that_was_never_called_loads(name):
    make, ours, other = PAIRS[name]
    make(ours).load_state_dict(make(other).state_dict(), strict=True)


@every_loss
def test_parameters_are_in_the_same_order_for_the_optimizer(name):
    ours, other = pair(name)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in other.named_parameters()]


@every_loss
def test_outputs_have_the_same_names_in_the_same_order(name):
    ours, other = pair(name)
    assert ours.out_keys == other.out_keys
    assert set(other.in_keys) - {"action_log_prob"} <= set(ours.in_keys)  # nobody reads the log-probability


@pytest.mark.parametrize("spec", [Bounded(-1, 1, (ACTION,)), Bounded(-1, 1, (3, 2))], ids=lambda s: str(tuple(s.shape)))
@pytest.mark.parametrize("composite", [None, (), (4,)])
@pytest.mark.parametrize("name", ["sac", "redq"])
def test_target_entropies_of_specs_agree(name, composite, spec):
    if composite is not None:
        spec = Composite(action=spec.expand(*composite, *spec.shape), shape=composite)
    make, *classes = PAIRS[name]
    ours, other = (make(cls, action_spec=spec, target_entropy="auto") for cls in classes)
    assert ours.target_entropy == other.target_entropy


@pytest.mark.parametrize("name", ["SACLoss", "REDQLoss"])
def test_networks_of_torchrl_agree(name):
    class Judge(nn.Linear):
        def forward(self, observation, action):
            return super().forward(torch.cat([observation, action], -1))

    torch.set_default_dtype(torch.float64)
    try:
        actor = ProbabilisticActor(
            TensorDictModule(LocScale(), ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=Bounded(-1, 1, (ACTION,)),
            distribution_class=TanhNormal,
            return_log_prob=True,
        )
        qvalue = ValueOperator(Judge(OBSERVATION + ACTION, 1), in_keys=["observation", "action"])
        ours, other = (
            {"SACLoss": SACLoss, "REDQLoss": REDQLoss}[name](actor, qvalue),
            getattr(theirs, name)(actor, qvalue),
        )
        assert other.target_entropy == ours.target_entropy
        other.load_state_dict(ours.state_dict())
        desynchronise_targets(ours, other)
        assert_parity(ours, other, transitions(BATCH))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("space", "distribution", "action"),
    [
        ("one-hot", OneHotCategorical, "one-hot"),
        (None, OneHotCategorical, "one-hot"),
        (OneHot(3), OneHotCategorical, "one-hot"),
        (Categorical(3), torch.distributions.Categorical, "categorical"),
        ("categorical", MaskedCategorical, "categorical"),
    ],
    ids=str,
)
def test_action_spaces_agree(space, distribution, action):
    if distribution is MaskedCategorical:
        distribution = lambda logits: MaskedCategorical(logits, mask=torch.tensor([True, True, True]))  # noqa: E731
    ours, other = pair("discrete_sac", action_space=space, distribution=distribution)
    assert_parity(ours, other, transitions(BATCH, action))


def test_a_trunk_that_separate_losses_leave_alone_agrees():
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, dtype=torch.float64), ["observation"], ["hidden"])
    head, value_head = qvalue_network(), value_network()
    head.in_keys, value_head.in_keys = ["hidden", "action"], ["hidden"]
    first = sac().actor_network
    losses = []
    for cls in (SACLoss, theirs.SACLoss):
        parameters, sampler = first[0], first[1]
        parameters.in_keys = ["hidden"]
        actor = type(first)(trunk, parameters, sampler)
        networks = (TensorDictSequential(trunk, head), TensorDictSequential(trunk, value_head))
        losses.append(cls(actor, *networks, target_entropy=-2.0, separate_losses=True))
    ours, other = losses
    other.load_state_dict(ours.state_dict())
    assert_parity(ours, other, transitions(BATCH))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_networks_that_compute_their_weights_in_each_call_agree(norm, size):
    # Before the call such a weight is a tensor with a history, which PyTorch doesn't copy.
    head = qvalue_network()
    for at in (0, 2):
        norm(head.module.layers[at])
    head.eval()
    actor = sac().actor_network
    ours, other = (cls(actor, head, num_qvalue_nets=size, target_entropy=-2.0) for cls in (SACLoss, theirs.SACLoss))
    other.load_state_dict(ours.state_dict())
    desynchronise_targets(ours, other)
    ours.eval(), other.eval()
    assert_parity(ours, other, transitions(BATCH))
