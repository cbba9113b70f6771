import pytest

from unimoe.compress.compressed_experts import attach
from unimoe.compress.otp import Heads
from unimoe.compress.plan import Plan
from unimoe.compress.skip_rules import install
from unimoe.errors import UserError
from unimoe.moe.view import view


def test_yaml_round_trip(tmp_path):
    plan = Plan(keep=[[0, 2], [1]], bits=[[4, 2], [3]], head=8, skip={"text": 0.2}, made_of="abc")
    plan.to_yaml(tmp_path / "plan.yaml")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kept: [[1]]", "a plan has no entry 'kept'"),
        ("- 1", "holds list, expected entries"),
        ("keep: [", "cannot be read"),
        ("keep: 2", "plan.keep is 2, expected a list of whole numbers for each MoE layer"),
        ("merge: [[0, '1']]", "plan.merge is .*, expected a list"),
        ("group: '64'", "plan.group is '64', expected a whole number"),
        ("bits: [4, 4]", "plan.bits is .*, expected a whole number, or a list"),
        ("head: true", "plan.head is True"),
        ("skip: thresholds", "plan.skip is 'thresholds', expected names with values"),
        ("made_of:", "plan.made_of is None, expected the sha256"),
    ],
)
def test_files_that_hold_no_plan(text, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        Plan.from_yaml(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(keep=[[0]]), "plan.keep has 1 layers, expected 2"),
        (Plan(keep=[[0], [2, 1]]), "keeps .2, 1., expected ascending"),
        (Plan(keep=[[0], []]), "keeps .., expected ascending"),
        (Plan(keep=[[0], [4]]), r"expected ascending numbers of 0\.\.3"),
        (Plan(merge=[[0, 0, 1, 1], [0, 2, 2, 0]]), "from 0 without gaps"),
        (Plan(bits=[[4, 4, 4], [4] * 4]), "has 4 experts, found 3"),
        (Plan(bits=5, group=16), "plan.bits is 5, expected one of 1, 2, 3, 4, 8, 16"),
        (Plan(bits=4, group=64), "plan.group is 64, expected a divisor of 32"),
    ],
)
def test_plans_that_do_not_fit(plan, message, families):
    with pytest.raises(UserError, match=message):
        plan.check(view(families("mixtral")))


def test_groups_keep_as_many_experts_each(families):
    layers = view(families("deepseek_v3"))
    Plan(keep=[[0, 1, 6, 7]]).check(layers)
    with pytest.raises(UserError, match=r"would keep \[3, 1\] experts of them, expected as many of each"):
        Plan(keep=[[0, 1, 2, 7]]).check(layers)
    with pytest.raises(UserError, match="at least 2"):
        Plan(keep=[[0, 7]]).check(layers)


def test_another_model():
    Plan(made_of="a").check_model("a")
    Plan().check_model("a")
    with pytest.raises(UserError, match="made of another model"):
        Plan(made_of="a").check_model("b")


def test_plans_compose():
    first = Plan(keep=[[0, 2, 3]])
    assert Plan(keep=[[0, 2]]).after(first) == Plan(keep=[[0, 3]])
    both = Plan(bits=4, group=32).after(Plan(merge=[[0, 0, 1]]).after(first))
    assert both == Plan(keep=[[0, 2, 3]], merge=[[0, 0, 1]], bits=4, group=32)
    for later, before in ((Plan(keep=[[0]]), Plan(merge=[[0, 0]])), (Plan(merge=[[0, 0]]), Plan(bits=4)),
                          (Plan(bits=2), Plan(bits=4)), (Plan(keep=[[0]]), Plan(main=1)),
                          (Plan(merge=[[0, 0]]), Plan(main=1)), (Plan(bits=4), Plan(main=1)),
                          (Plan(main=1), Plan(bits=4))):  # fmt: skip
        with pytest.raises(UserError, match="before that"):
            later.after(before)


def test_a_model_with_compressed_experts_is_not_changed_again(families):
    layers = view(families("mixtral"))
    attach(layers, 1)
    for plan in (Plan(keep=[[0, 1]] * 2), Plan(merge=[[0, 0, 1, 1]] * 2), Plan(bits=4, group=32)):
        with pytest.raises(UserError, match="compressed experts"):
            plan.check(layers)
    with pytest.raises(UserError, match="compressed experts"):
        Plan(main=1, bits=4, group=32).check(view(families("mixtral")))


def test_heads_need_as_many_experts_as_they_were_trained_for(families):
    layers = view(families("mixtral"))
    install(layers, Heads(8))
    Plan(keep=[[0, 1], [1, 2, 3]]).check(layers)
    with pytest.raises(UserError, match="would keep 1 experts, and its heads choose among 2"):
        Plan(keep=[[0, 1], [2]]).check(layers)


def test_a_composed_plan_is_for_the_first_model_and_packs_once():
    first = Plan(keep=[[0, 2]], made_of="a")
    assert Plan(keep=[[1]], made_of="b").after(first) == Plan(keep=[[2]], made_of="a")
    for packed in (Plan(bits=4, group=32), Plan(bits=4, linears=8), Plan(head=8)):
        for later in (Plan(linears=8, group=16), Plan(head=4), Plan(bits=2)):
            with pytest.raises(UserError, match="packed already"):
                later.after(packed)
