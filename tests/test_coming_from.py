"""Commands that people bring along: of other programs, and as the flags of a run, a model or an entry."""
import dataclasses
import importlib
import json
import re
import shlex
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import ppo_recurrent_tbb
import sac_gru
from models.begin_with import NOT_TAKEN_OVER
from models.flags import parse
from models.words import OURS, THEIRS
from tests.conftest import ROOT, SCRIPTS
from tests.helpers import run, small, weights_of

sys.path.insert(0, str(ROOT / "benchmark"))
from entries import entries  # noqa: E402

EVERY_SCRIPT = *SCRIPTS, "ppo_recurrent_tbb_multigpu"
COMMANDS = {name: shlex.split(entry["command"]) for name, entry in entries().items()}
ONE_ENTRY = {  # of each script, the one that says most
    COMMANDS[name][1].removesuffix(".py"): name for name in sorted(COMMANDS, key=lambda x: len(COMMANDS[x]))}
every_script = pytest.mark.parametrize("script", EVERY_SCRIPT, indirect=True)


def refused(capsys, script, words):
    """What is said of them, before anything is made."""
    with pytest.raises(SystemExit) as stop:
        parse(script.Args, script.SCRIPT, words)
    assert stop.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------- words of others

WORK = [  # in every script
    "--env-id CartPole-v1 --total-timesteps 50000 --seed 3",
    "--total_timesteps 50_000 --num_envs=4",
    "--track --wandb-project-name cleanRL --wandb-entity me --capture-video",
    "--gamma 0.98 --max-grad-norm 0.5 --no-capture-video",
    "--env-id=CartPole-v1 --device cpu --num-threads 2",
    "--eval-episodes 5",
]
CLEANRL = {  # habits, and the flag that the answer names in every script
    "--exp-name mine": "--run-name",
    "--torch-deterministic True": "--seed",
    "--cuda False": "--device cpu",
    "--no-cuda": "--device cpu",
    "--anneal-lr": "1e-3 0|2e-3 0",
    "--num-updates 100": "--total-timesteps",
    "--minibatch-size 64": "--num-minibatches|--batch-size|--tape-len",
    "--train-frequency 4": "--train-every|--num-steps",
    "--save-model --upload-model --hf-entity me": "model.safetensors",
    "--track True": "--no-track",
}
SB3 = {
    "--algo ppo_lstm --env CartPole-v1": "--env-id",
    "-n 100000": "--total-timesteps",
    "--n-timesteps=100000": "--total-timesteps",
    "--n_envs 8": "--num-envs",
    "-f logs --tensorboard-log tb": "--runs-dir",
    "--eval-freq 10000 --n-eval-episodes 5": "--eval-every.*--eval-episodes",
    "--trained-agent logs/best.zip": "--resume",
    "--load-best": "--model",
    "--lr 3e-4 --n_epochs 10": "--learning-rate|--policy-lr",
    "--env-kwargs size:8": "JSON",
    "-params learning_rate:0.001": "--flags",
    "-optimize --n-trials 50": "benchmark/tune.py",
}


@every_script
@pytest.mark.parametrize("flags", WORK)
def test_what_means_the_same_elsewhere_works(script, flags):
    args, _ = parse(script.Args, script.SCRIPT, flags.split())
    assert args != script.Args()


@every_script
@pytest.mark.parametrize("flags, ours", (CLEANRL | SB3).items())
def test_words_of_others_are_answered_by_ours(script, flags, ours, capsys):
    error = refused(capsys, script, flags.split())
    assert re.search(ours, error) and error.count("\n") == 1, error
    assert flags.split()[0].split("=")[0] in error


@every_script
def test_every_answer_names_flags_of_the_script(script, capsys):
    own = {field.name.replace("_", "-") for field in dataclasses.fields(script.Args)}
    for word in THEIRS.keys() - own:
        error = refused(capsys, script, [f"--{word}"])
        if "is not a flag here" in error:
            assert set(re.findall(r"--([a-z-]+)", error)) <= own | {word}, error
        else:
            assert "Unrecognized" in error                  # nothing here is like it


def test_every_answer_is_given_by_some_script():
    given = set()
    for name in EVERY_SCRIPT:
        Args = importlib.import_module(name).Args
        own = {field.name.replace("_", "-") for field in dataclasses.fields(Args)}
        for words, answers in OURS.items():
            fitting = [answer for answer in answers if set(re.findall("--([a-z-]+)", answer)) <= own]
            if set(words.split()) - own:
                given |= set(fitting[:1])
    assert {answer for answers in OURS.values() for answer in answers} == given


def test_flags_of_the_script_itself_are_not_looked_up():
    flags = ["--ent-coef", "0.1", "--num-steps", "9", "--vf-coef", "1"]
    assert parse(ppo_recurrent_tbb.Args, "ppo_recurrent_tbb", flags)[0].ent_coef == (0.1,)
    assert parse(sac_gru.Args, "sac_gru", ["--batch-size", "9", "--target-entropy", "-4"])[0].batch_size == 9


# ---------------------------------------------------------------------- --flags

def differences(args, others):
    return {name for name, value in vars(args).items() if value != vars(others)[name]}


def test_flags_of_a_run_an_args_json_and_a_model_file(script, tmp_path):
    """All that can change what is learned, which is then the same to the bit; given flags win."""
    there = dict(run_name="first", runs_dir=str(tmp_path), capture_video=True, render_mode="none", episodes=7)
    _, folder = run(tmp_path, script, seed=5, **there)
    first = script.Args(**small(script, seed=5, **there))
    for source in (folder, folder / "args.json", folder / "model.safetensors"):
        args, saved = parse(script.Args, script.SCRIPT, ["--flags", str(source)])
        assert not saved
        assert differences(args, first) == {
            "flags", "run_name", "runs_dir", "device", "capture_video", "render_mode", "episodes"}
        assert differences(args, script.Args()) & NOT_TAKEN_OVER == {"flags"}
        args, _ = parse(script.Args, script.SCRIPT, ["--seed", "6", "--flags", str(source), "--gamma", "0.5"])
        assert (args.seed, args.gamma, args.num_envs) == (6, 0.5, 4)

    again = ["--flags", str(folder), "--runs-dir", str(tmp_path), "--run-name", "again", "--device", "cpu"]
    script.main(again)
    weights = weights_of(folder)
    for name, weight in weights_of(tmp_path / "again").items():
        assert torch.equal(weight, weights[name]), name
    written = json.loads((tmp_path / "again/args.json").read_text())
    assert (written["script"], written["flags"], written["hidden_size"]) == (script.SCRIPT, str(folder), 8)
    args, _ = parse(script.Args, script.SCRIPT, ["--resume", str(tmp_path / "again")])
    assert args.flags == str(folder)                        # a resumed run still says where it came from


def test_flags_of_an_entry(script):
    name = ONE_ENTRY[script.SCRIPT]
    command, _ = parse(script.Args, script.SCRIPT, COMMANDS[name][2:])
    args, _ = parse(script.Args, script.SCRIPT, ["--flags", f"benchmark:{name}"])
    assert differences(args, command) == {"flags"} and differences(args, script.Args()) > {"flags"}
    args, _ = parse(script.Args, script.SCRIPT, ["--flags", f"benchmark:{name}", "--seed", "9"])
    assert differences(args, command) == {"flags", "seed"}


@every_script
def test_flags_of_others_are_refused_and_name_the_script(script, capsys):
    for other, name in ONE_ENTRY.items():
        if other != script.SCRIPT:
            error = refused(capsys, script, ["--flags", f"benchmark:{name}"])
            assert f"use python {other}.py" in error and error.count("\n") == 1


@pytest.mark.quick
@pytest.mark.parametrize("source, says", [
    ("benchmark:key-to-dor-60", "as benchmark:key-to-door-60, "),
    ("benchmark:popgym", "as benchmark:popgym__"),
    ("benchmark:popgym__autoencode", "as benchmark:popgym__autoencode__lru__"),
    ("benchmark:", "not an entry"), ("nowhere", "does not exist"), (".", "does not exist"),
    ("", "does not exist"),
    ("README.md", "cannot be read"), ("/dev/null", "cannot be read"),
    ("benchmark/models/count-input-sac.safetensors", "use python sac_gru.py"),
    ("torn.json", "cannot be read"), ("list.json", "cannot be read"), ("torn.safetensors", "cannot be read"),
    ("nameless.json", '"script": "'), ("typo.json", "--hiden-size"), ("wrong.json", '--num-envs "four"'),
    ("range.json", "--num-envs 0")])
def test_what_holds_no_flags_is_one_sentence(source, says, tmp_path, capsys):
    ours = {"script": "ppo_recurrent_tbb"}
    files = {"torn": '{"script": "ppo', "list": "[1]", "nameless": '{"memory": "gru"}',
             "typo": json.dumps(ours | {"hiden_size": 3}), "wrong": json.dumps(ours | {"num_envs": "four"}),
             "range": json.dumps(ours | {"num_envs": 0})}
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    whole = (ROOT / "benchmark/models/poc-gru.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[:999])
    path = tmp_path / source if (tmp_path / source).is_file() else source
    error = refused(capsys, ppo_recurrent_tbb, ["--flags", str(path)])
    assert says in error and error.count("\n") == 1, error


@pytest.mark.quick
@pytest.mark.parametrize("flag", ["--model", "--resume"])
def test_what_has_flags_of_its_own_takes_no_others(flag, capsys):
    error = refused(capsys, ppo_recurrent_tbb, ["--flags", "benchmark:key-to-door-60", flag, "runs/mine"])
    assert flag in error and "leave one of them out" in error and error.count("\n") == 1


# ---------------------------------------------------------------------- help, TensorBoard, films

@every_script
def test_help_is_in_groups(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    said = capsys.readouterr().out
    titles = re.findall(r"^(?:├─| -) (\w+) [─-]+", said, re.M)
    blocks = ["task", "memory", "experience", "algorithm", "run"]
    assert stop.value.code == 0
    assert titles == blocks or titles == [title for title in blocks if title != "experience"]
    flags = re.findall(r"^(?:├─| -) (\w+) .*\n. --([a-z-]+)", said, re.M)
    assert flags[:2] == [("task", "env-id"), ("memory", "memory")]
    assert len(re.findall(r"^. --", said, re.M)) == len(dataclasses.fields(script.Args))


def test_tensorboard_compares_the_flags_of_runs_in_their_own_events(script, tmp_path):
    _, folder = run(tmp_path, script, seed=5, eval_every=128, eval_episodes=2)
    run(tmp_path, script, resume=str(folder), total_timesteps=4 * 128)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not [path for path in folder.iterdir() if path.is_dir()]
    events = EventAccumulator(str(folder)).Reload()
    found = {tag: HParamsPluginData.FromString(content)
             for tag, content in events.PluginTagToContent("hparams").items()}
    flags = found["_hparams_/session_start_info"].session_start_info.hparams
    assert (flags["seed"].number_value, flags["memory"].string_value) == (5, "gru")
    assert set(flags) == {field.name for field in dataclasses.fields(script.Args)}
    assert "_hparams_/session_end_info" in found
    metrics = {info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos}
    assert {"eval/episodic_return", "charts/episodic_return"} <= metrics & set(events.Tags()["scalars"])


def test_films_go_to_weights_and_biases_with_track_only(script, tmp_path, monkeypatch):
    sent = []
    wandb = types.SimpleNamespace(
        init=lambda **kwargs: None, log=sent.append, Video=lambda path, format: (path, format))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path, script, run_name="mine", capture_video=True, checkpoint_every=10**6)
    assert not sent
    _, folder = run(tmp_path, script, track=True, capture_video=True, checkpoint_every=10**6)
    films = [(str(folder / f"videos/{step}.gif"), "gif") for step in (0, 384)]
    assert [row["videos/episode"] for row in sent] == films
    assert [row["global_step"] for row in sent] == [0, 384]
