"""Which arms there are, and after how many updates their networks are kept."""

from __future__ import annotations

from jacnorm.studies.sharpening.arms import Arm, arms, trainings
from jacnorm.studies.sharpening.settings import RegulariserSettings


def test_the_arms_of_the_smoke_scale():
    assert [str(each) for each in arms(RegulariserSettings())] == [
        "none 0 learning_rate=0.1 batch=32",
        "weight decay 0.001 learning_rate=0.1 batch=32",
        "weight decay 0.005 learning_rate=0.1 batch=32",
        "weight decay 0.02 learning_rate=0.1 batch=32",
        "label smoothing 0.1 learning_rate=0.1 batch=32",
        "label smoothing 0.3 learning_rate=0.1 batch=32",
        "mixup 0.2 learning_rate=0.1 batch=32",
        "mixup 1 learning_rate=0.1 batch=32",
        "sam 0.05 learning_rate=0.1 batch=32",
        "sam 0.2 learning_rate=0.1 batch=32",
        "jacobian penalty 0.03 learning_rate=0.1 batch=32",
        "none 0 learning_rate=0.02 batch=32",
        "none 0 learning_rate=0.5 batch=32",
        "none 0 learning_rate=0.1 batch=8",
        "none 0 learning_rate=0.1 batch=200",
    ]


def test_every_strength_and_batch_at_every_base_step_size_and_nothing_twice():
    settings = RegulariserSettings(
        learning_rates=[0.1, 0.4],
        other_learning_rates=[0.4, 0.2],
        other_batches=[32, 8],
        weight_decays=[],
        smoothings=[0.1],
        mixups=[],
        sam_radii=[],
        jacobian_penalties=[],
        shifts=[0.5],
        crops=[2],
    )
    found = arms(settings)
    assert len(found) == len(set(found))
    assert set(found) == {
        *(Arm("none", 0.0, rate, 32) for rate in (0.1, 0.2, 0.4)),
        *(Arm("none", 0.0, rate, 8) for rate in (0.1, 0.4)),
        *(
            Arm(regulariser, strength, rate, 32)
            for regulariser, strength in (("label smoothing", 0.1), ("shifts", 0.5), ("crops", 2.0))
            for rate in (0.1, 0.4)
        ),
    }
    assert all(isinstance(each.strength, float) for each in found)


def test_an_arm_has_one_regulariser():
    arm = Arm("mixup", 0.2, 0.1, 32)
    assert arm.strength_of("mixup") == 0.2
    assert arm.strength_of("sam") == 0.0
    assert arm.step == "plain"
    assert Arm("sam", 0.2, 0.1, 32).step == "sam"
    assert arm.columns == {"regulariser": "mixup", "strength": 0.2, "learning_rate": 0.1, "batch": 32}


def test_equal_updates_and_equal_epochs_of_one_training():
    """200 samples: 7 batches of 32 in an epoch, so 1400 updates are 200 epochs; 25 batches of 8, one of 200."""
    found = {str(each.arm): each for each in trainings(RegulariserSettings(), 200)}
    assert len(found) == 15
    base, small, whole = (found[f"none 0 learning_rate=0.1 batch={batch}"] for batch in (32, 8, 200))
    assert dict(base.budgets) == {"updates": 1400, "epochs": 1400}
    assert dict(small.budgets) == {"updates": 1400, "epochs": 5000}
    assert dict(whole.budgets) == {"updates": 1400, "epochs": 200}
    assert [each.updates for each in (base, small, whole)] == [1400, 5000, 1400]
    assert base.rules == ["updates", "epochs", "matched"]
    others = [each for each in found.values() if each not in (base, small, whole)]
    assert all(dict(each.budgets) == {"updates": 1400} and each.matched for each in others)


def test_without_other_batch_sizes_there_are_no_equal_epochs():
    for batches in ([], [32]):
        for each in trainings(RegulariserSettings(other_batches=batches), 200):
            assert each.rules == ["updates", "matched"]


def test_a_schedule_belongs_to_one_budget():
    settings = RegulariserSettings(other_batches=[8, 30], decays=[0.5], updates=70)
    found = [each for each in trainings(settings, 200) if each.arm.batch != 32]
    assert [(each.arm.batch, dict(each.budgets), each.matched) for each in found] == [
        (8, {"updates": 70}, True),
        (8, {"epochs": 250}, False),
        (30, {"updates": 70, "epochs": 70}, True),  # 7 batches an epoch too
    ]
    assert all(list(each.decays) == [0.5] for each in found)


def test_a_budget_of_less_than_an_update_is_one_update():
    settings = RegulariserSettings(updates=1, other_batches=[200])
    assert next(each for each in trainings(settings, 200) if each.arm.batch == 200).budgets["epochs"] == 1
