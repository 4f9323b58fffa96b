"""IterativeGRPO: the stages, labels by file, kills, what a control does, bad input."""

import json

import pytest
import tiny_trainer
from safetensors.torch import load_file

from grpo_fast import GRPOConfig, IterativeGRPO, RewardModelConfig
from grpo_fast.trainer.iterative import STAGES, hacked
from grpo_fast.trainer.iterative_config import IterativeConfig
from grpo_fast.trainer.labels import LabelsNeeded
from grpo_fast.trainer.stages import Interrupted, Stages, read_rows

COMMON = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
}


def judge(completions, **_):
    return tiny_trainer.count_w3(completions)


def loop(folder, source, judge=judge, **changes):
    extra = {k: changes.pop(k) for k in ("reward_model",) if k in changes}
    settings = {
        "output_dir": str(folder),
        "iterations": 2,
        "collect_prompts": 8,
        "held_out_prompts": 4,
        "seed": 5,
        "validation_split": 0.3,
    }
    return IterativeGRPO(
        source,
        judge,
        IterativeConfig(**{**settings, **changes}),
        tiny_trainer.dataset(16),
        GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            max_steps=2,
            learning_rate=3e-3,
            **COMMON,
        ),
        RewardModelConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            max_length=None,
            **COMMON,
        ),
        **extra,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_trainer.checkpoint(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, loop(folder, source).train()


def weights(folder):
    found = {}
    for path in sorted(folder.glob("*/model/model.safetensors")):
        found.update({f"{path.parent.parent.name}/{k}": v for k, v in load_file(path).items()})
    return found


def test_stages_reports_and_pictures(whole):
    folder, reports = whole
    names = {p.name for p in folder.iterdir()}
    assert {f"{t:03d}-{s}" for t in (1, 2) for s in STAGES} | {"000-start", "report"} <= names
    assert not list(folder.rglob("checkpoint-*"))
    assert [len(r["accuracy"]) for r in reports] == [1, 2]
    page = (folder / "report" / "index.md").read_text()
    assert "## Completions after iteration 2" in page and "| R 2 |" in page
    for name in ("curves.png", "accuracy.png"):
        assert (folder / "report" / name).stat().st_size > 1000
    assert reports[0]["kl_first"] == reports[0]["kl_last"] > 0
    assert reports[1]["kl_first"] != reports[1]["kl_last"]
    rows = read_rows(folder / "001-collect" / "completions.jsonl")
    asked = {r["prompt"] for r in rows if not r["held_out"]}
    assert not asked & {r["prompt"] for r in rows if r["held_out"]}


def test_a_finished_run_is_read_and_nothing_is_done(whole, source, capsys):
    folder, reports = whole
    assert loop(folder, source).train() == reports
    assert "[iteration" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="history_share was 0.1, is 0.3"):
        loop(folder, source, history_share=0.3).train()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["start", *STAGES])
def test_killed_at_the_end_of_any_stage_before_its_seal(
    whole, source, tmp_path, monkeypatch, stage
):
    """All of a stage's work is there but the seal; trainers have a checkpoint of the last step."""
    from grpo_fast.trainer import checkpoint

    seal, name = checkpoint.seal, f"{0 if stage == 'start' else 2:03d}-{stage}.part"

    def dying(folder, *rest):
        if folder.name == name:
            raise Killed
        return seal(folder, *rest)

    monkeypatch.setattr(checkpoint, "seal", dying)
    with pytest.raises(Killed):
        loop(tmp_path, source).train()
    monkeypatch.setattr(checkpoint, "seal", seal)
    check_same(whole, tmp_path, loop(tmp_path, source).train())


def check_same(whole, folder, reports):
    assert reports == whole[1]
    ours, theirs = weights(folder), weights(whole[0])
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not ours[k].equal(theirs[k])] == []


@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_killed_inside_a_trainer(whole, source, tmp_path, monkeypatch, at):
    """After the at-th optimizer step of all trainers together, its checkpoint written or not."""
    from grpo_fast.trainer.resume import ResumableTrainer

    step, count = ResumableTrainer.training_step, [0]

    def dying(self, *args, **kwargs):
        count[0] += 1
        if count[0] == at + 1:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "training_step", dying)
    with pytest.raises(Killed):
        loop(tmp_path, source).train()
    check_same(whole, tmp_path, loop(tmp_path, source).train())


def test_a_signal_ends_no_stage(whole, source, tmp_path, monkeypatch):
    """The trainer returns early then; what it has must not be sealed."""
    import os
    import signal

    from grpo_fast.trainer.resume import ResumableTrainer

    step, count = ResumableTrainer.training_step, [0]

    def heard(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 2:  # the first of two steps of a policy
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "training_step", heard)
    with pytest.raises(Interrupted, match="signal 15 ended the run"):
        loop(tmp_path, source).train()
    check_same(whole, tmp_path, loop(tmp_path, source).train())


def test_labels_of_people_make_the_same_run(whole, source, tmp_path):
    first = loop(tmp_path, source, "file", iterations=1)
    with pytest.raises(LabelsNeeded, match="wait for labels") as waiting:
        first.train()
    lines = read_rows(waiting.value.questions)
    assert waiting.value.count == len(lines)
    target = waiting.value.labels
    for line in lines:
        line["score"] = judge([line["completion"]])[0]
    for wrong, message in (
        (lines[1:], "a line for every id"),
        ([*lines, {"id": "other", "score": 1}], "'other', which is foreign"),
        ([*lines, lines[0]], "each id once"),
        ([{**lines[0], "score": "good"}, *lines[1:]], "a finite number or null"),
        ([{"id": line["id"], "score": None} for line in lines], "null in every line"),
        ([{"score": 1}], "a JSON object with 'id' and 'score'"),
    ):
        target.write_text("\n".join(map(json.dumps, wrong)))
        with pytest.raises(ValueError, match=message):
            loop(tmp_path, source, "file", iterations=1).train()
    target.write_text("\n".join(map(json.dumps, lines)))
    (report,) = loop(tmp_path, source, "file", iterations=1).train()
    assert report["judge_before"] == pytest.approx(whole[1][0]["judge_before"], abs=1e-6)
    assert "judge" not in report and report["reward"] is not None


def test_a_judge_that_says_nothing(source, tmp_path):
    def silent(completions, **_):
        return [None] * len(completions)

    def same(completions, **_):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match="judge: expected a number for some completion, got None"):
        loop(tmp_path / "a", source, silent).train()
    assert (tmp_path / "a" / "001-collect").is_dir()
    with pytest.raises(ValueError, match="judge: expected a preference among the answers"):
        loop(tmp_path / "b", source, same).train()


def test_damaged_stage_is_refused(tmp_path):
    stages = Stages(str(tmp_path), {})
    stages.run("one", lambda folder: (folder / "a.txt").write_text("first") and None)
    (tmp_path / "one" / "a.txt").write_text("other")
    with pytest.raises(ValueError, match="its file a.txt is damaged"):
        stages.run("one", lambda folder: None)


def test_hacking_is_seen_and_a_plateau_ends_the_run(source, tmp_path):
    base = {"reward_before": 0.0, "judge_before": 1.0}
    assert hacked({**base, "reward": 1.0, "judge": 0.5})
    assert not hacked({**base, "reward": 1.0, "judge": 1.5})
    assert not hacked({**base, "reward": 1.0})
    made = loop(tmp_path, source, patience=1, min_delta=0.05)
    reports = [{"judge": v} for v in (0.1, 0.3, 0.32)]
    assert [made._plateau(reports[:n]) for n in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations: expected an integer >= 1"),
        ({"validation_split": 0}, "validation_split"),
        ({"history_share": 1}, "history_share"),
        ({"patience": -1}, "patience"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        IterativeConfig(**change)
