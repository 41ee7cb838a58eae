"""The recipe's helpers: which parameters decay, and the learning rate in phases."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from cases import ALGORITHMS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from maxva_kernels import MAdam
from maxva_kernels.recipe import Phase, PhasedLR, param_groups_weight_decay

# The paper's schedule (Section 5.4) on its repository's warm-up, power and ratio of the rates.
BERT = [
    Phase(7038, warmup=0.2843, power=0.5, from_peak=False),
    Phase(1563, warmup=0.128, power=0.5, from_peak=False, scale=2 / 3),
]
SHORT = [Phase(6, warmup=2), Phase(4, warmup=0.25, power=2.0, scale=0.5)]
# Linear from 1 over 4 steps; then 1 step of warm-up, and squares of 1, 2/3, 1/3 of a half.
SHORT_RATES = [0.5, 1, 1, 0.75, 0.5, 0.25, 0.5, 0.5, 2 / 9, 1 / 18, 0, 0]


def names(groups):
    """The names that decay, and those that do not."""
    return [[name for group in groups if bool(group["weight_decay"]) is decays for name in group["param_names"]]
            for decays in (True, False)]  # fmt: skip


# --- parameter groups ------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.image_norm = nn.LayerNorm((3, 4))
        self.image_rms = nn.RMSNorm((3, 4))
        self.batch = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.ones(()))


def test_who_decays():
    """Guards every rule: biases, also of three dimensions, norms, also of two, shared, frozen and bare parameters."""
    model = Mixed()
    groups = param_groups_weight_decay(model, 0.1)
    assert names(groups) == [
        ["token", "embedding.weight", "linear.weight", "attention.in_proj_weight", "attention.out_proj.weight"],
        ["scale", "linear.bias", "norm.weight", "norm.bias", "image_norm.weight", "image_norm.bias",
         "image_rms.weight", "batch.weight", "batch.bias",
         "attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias",
         "head.bias"],
    ]  # fmt: skip
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    listed = [param for group in groups for param in group["params"]]
    trained = [param for param in model.parameters() if param.requires_grad]
    assert len(listed) == len(trained) == len(set(listed))
    assert set(listed) == set(trained)
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(parameters[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


def test_named_parameters_count_once_whoever_repeats_them():
    """Guards against a shared parameter in two groups, which torch refuses, where the caller lists it twice."""
    model = Mixed()
    pairs = list(model.named_parameters(remove_duplicate=False))
    assert "head.weight" in dict(pairs)
    decaying, rest = names(param_groups_weight_decay(iter(pairs), 0.1))
    # Without the modules a norm over two dimensions is a matrix like others.
    assert set(names(param_groups_weight_decay(model, 0.1))[1]) - set(rest) == {"image_norm.weight", "image_rms.weight"}
    assert "head.weight" not in decaying


def test_first_of_a_shared_parameters_names_decides():
    """Guards against a parameter in both groups where its names are of both kinds, and a name that is not its first."""
    table, gain = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    pairs = [("a.bias", table), ("b.weight", table), ("c.weight", gain), ("d.weight", gain)]
    assert names(param_groups_weight_decay(pairs, 0.1)) == [[], ["a.bias", "c.weight"]]
    assert names(param_groups_weight_decay(pairs[1:2] + pairs[:1], 0.1)) == [["b.weight"], []]


def test_a_modules_name_makes_no_bias():
    """Guards against decay lost by all that is in a module with "bias" in its name, as T5's relative_attention_bias."""
    pairs = [("relative_bias.weight", torch.ones(2, 3)), ("attention.relative_bias", torch.ones(2, 3))]
    pairs = [(name, nn.Parameter(tensor)) for name, tensor in pairs]
    assert names(param_groups_weight_decay(pairs, 0.1)) == [["relative_bias.weight"], ["attention.relative_bias"]]


def test_bert_has_decay_where_its_authors_put_it():
    """Guards the rule on the model it is for: no decay for LayerNorms and biases, decay for everything else."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[bench]'")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForMaskedLM(config)
    all_names = [name for name, _ in model.named_parameters()]
    spared = [name for name in all_names if "LayerNorm" in name or name.endswith("bias")]
    assert 20 < len(spared) < len(all_names)
    assert names(param_groups_weight_decay(model, 0.01)) == [[n for n in all_names if n not in spared], spared]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_groups_train_and_their_names_reach_the_errors(algorithm):
    """Guards against groups that this package's optimizers do not take, and decay of the wrong ones."""
    model = Mixed()
    before = copy.deepcopy(model)
    optimizer = algorithm(param_groups_weight_decay(model, 0.5), lr=0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    optimizer.step()
    torch.testing.assert_close(model.linear.weight, 0.95 * before.linear.weight)
    assert torch.equal(model.linear.bias, before.linear.bias)
    assert torch.equal(model.image_norm.weight, before.image_norm.weight)
    assert torch.equal(model.frozen.weight, before.frozen.weight)
    again = algorithm(param_groups_weight_decay(model, 0.5))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[1]["param_names"] == optimizer.param_groups[1]["param_names"]
    optimizer.state[model.linear.bias]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"'linear\.bias'"):
        optimizer.step()


def test_only_groups_with_parameters():
    """Guards against an empty group, which some engines do not take."""
    assert names(param_groups_weight_decay(nn.Linear(2, 2, bias=False), 0.1)) == [["weight"], []]
    (group,) = param_groups_weight_decay(nn.LayerNorm(2), 0.1)
    assert group["weight_decay"] == 0
    decaying, rest = param_groups_weight_decay(nn.Linear(2, 2), 0)  # no decay at all
    assert [decaying["param_names"], rest["param_names"]] == [["weight"], ["bias"]]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_engines(one_rank):
    """Guards parameters that an engine has changed: a matrix that looks like a vector loses its decay silently."""
    plain = names(param_groups_weight_decay(Mixed(), 0.1))
    model = Mixed()
    model.scale = nn.Parameter(torch.ones(1))  # fully_shard takes no scalars
    groups = param_groups_weight_decay(fully_shard(model, mesh=init_device_mesh("cpu", (1,))), 0.1)
    assert names(groups) == plain
    assert isinstance(groups[0]["params"][0], DTensor)

    zero = ZeroRedundancyOptimizer(param_groups_weight_decay(Mixed(), 0.1), MAdam)
    assert [group["weight_decay"] for group in zero.param_groups] == [0.1, 0]

    layer = nn.Linear(3, 3)
    layer.weight.ds_shape = layer.weight.shape  # as DeepSpeed's ZeRO-3 leaves it
    layer.weight.data = torch.empty(0)
    assert names(param_groups_weight_decay(layer, 0.1)) == [["weight"], ["bias"]]

    for whole in (False, True):
        flat = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(3, 3)), use_orig_params=whole, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="model: FSDP1 has flattened"):
            param_groups_weight_decay(flat, 0.1)
        if not whole:  # of what is wrapped
            with pytest.raises(ValueError, match="model: FSDP1 has flattened '_flat_param'"):
                param_groups_weight_decay(flat.module, 0.1)
    with FullyShardedDataParallel.summon_full_params(flat):
        groups = param_groups_weight_decay(flat, 0.1)
    assert names(groups) == [["0.weight"], ["0.bias"]]
    assert {param for group in groups for param in group["params"]} == set(flat.parameters())


@pytest.mark.parametrize(
    ("model", "weight_decay", "error", "message"),
    [
        (nn.Linear(2, 2), -0.1, ValueError, "weight_decay must be a finite number >= 0, got -0.1"),
        (nn.Linear(2, 2), float("nan"), ValueError, "weight_decay"),
        (nn.Linear(2, 2), None, TypeError, "weight_decay"),
        (list(nn.Linear(2, 2).parameters()), 0.1, TypeError, "model must be .* iterable of Parameter"),
        ({"weight": torch.zeros(2)}, 0.1, TypeError, "model must be .* iterable of str"),
        (torch.zeros(2), 0.1, TypeError, "model must be .* got Tensor"),
        (None, 0.1, TypeError, "model must be .* got NoneType"),
        (nn.Linear(2, 2).requires_grad_(False), 0.1, ValueError, "model has no parameter"),
        (nn.ReLU(), 0.1, ValueError, "model has no parameter"),
        (nn.LazyLinear(3), 0.1, ValueError, "model: 'weight' has no shape yet"),
    ],
)
def test_wrong_arguments_of_groups(model, weight_decay, error, message):
    """Guards messages that name the argument, in place of an AttributeError from inside or an empty optimizer."""
    with pytest.raises(error, match=message):
        param_groups_weight_decay(model, weight_decay)


# --- the schedule ----------------------------------------------------------------------------------------------------


def optimizer_with(*rates, **options):
    return MAdam([{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in rates], **options)


def follow(optimizer, schedule, steps):
    """The rates that the optimizer's steps see, a list of all groups' for each."""
    seen = []
    for _ in range(steps):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def test_rates_by_hand():
    """Guards the formula, where phases meet, and what comes after the last step."""
    optimizer = optimizer_with(1.0)
    seen = follow(optimizer, PhasedLR(optimizer, SHORT), len(SHORT_RATES))
    assert [rate for (rate,) in seen] == pytest.approx(SHORT_RATES, rel=1e-15)


@pytest.mark.parametrize(
    ("phase", "rates"),
    [
        (Phase(3), [1, 2 / 3, 1 / 3]),
        (Phase(4, warmup=0.5, from_peak=False), [0.5, 1, 0.5, 0.25]),  # 1, 0.75 of the phase are warm-up here
        (Phase(4, warmup=4), [0.25, 0.5, 0.75, 1]),
        (Phase(4, warmup=0.9), [0.25, 0.5, 0.75, 1]),  # rounded
        (Phase(4, warmup=1), [1, 1, 2 / 3, 1 / 3]),
        (Phase(3, power=0), [1, 1, 1]),
        (Phase(3, scale=0), [0, 0, 0]),
        (Phase(1), [1]),
    ],
)
def test_one_phase_by_hand(phase, rates):
    """Guards each argument at its bounds: no warm-up, nothing else, a constant rate, one step."""
    assert [phase.rate(step, 1.0) for step in range(phase.steps + 2)] == pytest.approx([*rates, 0, 0], rel=1e-15)


def test_the_papers_schedule():
    """Guards Section 5.4's numbers: the first and last steps, the ends of both warm-ups, the change of the phase."""
    optimizer = optimizer_with(3.4e-3)
    schedule = PhasedLR(optimizer, BERT)
    assert [phase.warmup_steps for phase in BERT] == [2001, 200]
    rates, phases = {}, {}
    for step in range(7038 + 1563 + 1):
        rates[step], phases[step] = schedule.get_last_lr()[0], schedule.phase
        optimizer.step()
        schedule.step()
    second = 2.266666666666667e-3
    expected = {
        0: 3.4e-3 / 2001,
        2000: 3.4e-3,
        2001: 3.4e-3 * (5037 / 7038) ** 0.5,
        7037: 3.4e-3 * (1 / 7038) ** 0.5,
        7038: second / 200,
        7038 + 199: second,
        7038 + 200: second * (1363 / 1563) ** 0.5,
        8600: second * (1 / 1563) ** 0.5,
        8601: 0,
    }
    assert {step: rates[step] for step in expected} == pytest.approx(expected, rel=1e-14)
    assert {step: phases[step] for step in (0, 7037, 7038, 8600, 8601)} == {0: 0, 7037: 0, 7038: 1, 8600: 1, 8601: 1}


@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_rates_are_updated_in_place(capturable):
    """Guards a captured CUDA graph and compiled steps, which know the tensor: a new one would never be seen."""
    optimizer = optimizer_with(torch.tensor(2.0), capturable=capturable)
    tensor = optimizer.param_groups[0]["lr"]
    schedule = PhasedLR(optimizer, SHORT)
    seen = []
    for _ in SHORT_RATES:
        assert optimizer.param_groups[0]["lr"] is tensor
        seen.append(tensor.item())
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([2 * rate for rate in SHORT_RATES], rel=1e-6)
    assert torch.equal(optimizer.param_groups[0]["initial_lr"], torch.tensor(2.0))


def test_groups_keep_the_ratio_of_their_rates():
    """Guards layer-wise rates, one of them 0, against the first group's rate."""
    optimizer = optimizer_with(1.0, 0.25, 0.0)
    for step, rates in enumerate(follow(optimizer, PhasedLR(optimizer, SHORT), len(SHORT_RATES))):
        one = SHORT_RATES[step]
        assert rates == pytest.approx([one, 0.25 * one, 0.0], rel=1e-15)


def train(optimizer, schedule, steps):
    for step in steps:
        for i, group in enumerate(optimizer.param_groups):
            group["params"][0].grad = torch.tensor([1.0, -2.0]) * (1 + i + step % 3)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 7, 10])
@pytest.mark.parametrize("capturable", [False, True])
def test_resumed_run_is_the_same_run(stop, capturable, tmp_path):
    """Guards a resume within and between the phases; the file is one that `torch.load` takes without pickled code."""

    def start():
        optimizer = optimizer_with(0.1, 0.03, capturable=capturable)
        return optimizer, PhasedLR(optimizer, SHORT)

    whole = start()
    train(*whole, range(11))
    first = start()
    train(*first, range(stop))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    optimizer, schedule = start()
    for part, group in zip(first[0].param_groups, optimizer.param_groups, strict=True):
        group["params"][0].data.copy_(part["params"][0].data)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert schedule.phases == tuple(SHORT)
    assert schedule.get_last_lr() == first[1].get_last_lr()
    train(optimizer, schedule, range(stop, 11))
    for mine, other in zip(optimizer.param_groups, whole[0].param_groups, strict=True):
        assert mine["lr"] == other["lr"]
        assert torch.equal(mine["params"][0], other["params"][0])


def test_goes_on_from_the_optimizers_groups():
    """Guards torch's other way to resume, `last_epoch`."""
    optimizer = optimizer_with(1.0)
    follow(optimizer, PhasedLR(optimizer, SHORT), 7)
    schedule = PhasedLR(optimizer, SHORT, last_epoch=6)
    assert [rate for (rate,) in follow(optimizer, schedule, 5)] == pytest.approx(SHORT_RATES[7:], rel=1e-15)
    with pytest.raises(KeyError, match="initial_lr"):
        PhasedLR(optimizer_with(1.0), SHORT, last_epoch=6)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_copied_and_pickled(twin):
    """Guards a schedule that holds a function, which cannot be sent to another process."""
    optimizer = optimizer_with(1.0)
    schedule = PhasedLR(optimizer, SHORT)
    follow(optimizer, schedule, 4)
    other = twin(schedule)
    assert other.optimizer is not optimizer
    assert [rate for (rate,) in follow(other.optimizer, other, 8)] == pytest.approx(SHORT_RATES[4:], rel=1e-15)
    assert schedule.get_last_lr() == pytest.approx([0.5])  # the first was not moved


def test_after_another_schedule():
    """Guards against a schedule that counts from the run's beginning, and not from its own, within SequentialLR."""
    optimizer = optimizer_with(1.0)

    def make(optimizer):
        parts = [ConstantLR(optimizer, factor=0.125, total_iters=9), PhasedLR(optimizer, SHORT)]
        return SequentialLR(optimizer, parts, milestones=[3])

    schedule = make(optimizer)
    assert [rate for (rate,) in follow(optimizer, schedule, 5)] == pytest.approx([0.125] * 3 + SHORT_RATES[:2])
    other = optimizer_with(1.0)
    again = make(other)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert [rate for (rate,) in follow(other, again, 10)] == pytest.approx(SHORT_RATES[2:], rel=1e-15)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an int >= 1, got 0"),
        ({"steps": 10.0}, ValueError, "steps must be an int"),
        ({"steps": True}, ValueError, "steps must be an int"),
        ({"warmup": 1.0}, ValueError, r"warmup must be an int \(steps\) or a float in \[0, 1\)"),
        ({"warmup": -0.1}, ValueError, "warmup"),
        ({"warmup": float("nan")}, ValueError, "warmup"),
        ({"warmup": 11}, ValueError, "warmup must be from 0 to steps=10 if an int, got 11"),
        ({"warmup": -1}, ValueError, "warmup"),
        ({"warmup": "0.1"}, ValueError, "warmup"),
        ({"warmup": True}, ValueError, "warmup"),
        ({"power": -1.0}, ValueError, "power must be a finite number >= 0"),
        ({"power": float("inf")}, ValueError, "power"),
        ({"power": "1"}, TypeError, "power"),
        ({"scale": -1.0}, ValueError, "scale must be a finite number >= 0"),
        ({"scale": float("nan")}, ValueError, "scale"),
    ],
)
def test_wrong_arguments_of_a_phase(arguments, error, message):
    """Guards messages that name the argument: a wrong one would show after hours, as a rate that is off."""
    with pytest.raises(error, match=message):
        Phase(**{"steps": 10, **arguments})


@pytest.mark.parametrize(
    ("phases", "error", "message"),
    [
        ([], ValueError, "phases must not be empty"),
        (Phase(3), TypeError, "phases must be a list of Phase, got Phase"),
        ([Phase(3), 100], TypeError, "phases must be a list of Phase, got int in it"),
        (None, TypeError, "phases"),
    ],
)
def test_wrong_phases(phases, error, message):
    """Guards messages that name the argument, and an optimizer whose rates a failed constructor has not touched."""
    optimizer = optimizer_with(1.0)
    with pytest.raises(error, match=message):
        PhasedLR(optimizer, phases)
    assert optimizer.param_groups[0]["lr"] == 1
    assert "initial_lr" not in optimizer.param_groups[0]
    with pytest.raises(TypeError, match="not an Optimizer"):
        PhasedLR(nn.Linear(2, 2), SHORT)
