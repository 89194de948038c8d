"""Bad command lines of every script and every tool: a sentence, exit code 2, nothing left behind, at once.

Most are generated: every flag of every script gets what its type refuses. The others are what people typed.
"""
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
import typing

import pytest
import safetensors.torch
import torch

from models.flags import MOST, Json, Schedule, read_checkpoint, read_model
from models.loading import HELD
from tests.conftest import CONTINUOUS, ROOT, SCRIPTS
from tests.helpers import run

sys.path.insert(0, str(ROOT / "benchmark"))
EVERY_SCRIPT = *SCRIPTS, "ppo_recurrent_tbb_multigpu"
SHIPPED = ROOT / "benchmark/models/poc-gru.safetensors"


def assert_refused(program, argv, says, capsys):
    """says: what the sentence has to name."""
    folder, begin = os.getcwd(), time.perf_counter()
    before = sorted(os.listdir(folder))
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2, (argv, said)
    assert says in said and "Traceback" not in said, (argv, said)
    assert said.count("\n") == 1, (argv, said)
    assert sorted(os.listdir(folder)) == before, argv
    assert time.perf_counter() - begin < 10, argv


# ---------------------------------------------------------------------- generated

def wrong_values(name, hint):
    """What a flag of this type must refuse, each one a list of words."""
    if hint == Json:
        return [[""], ["[1"], ["3"], ["null"], ["[]"], ['"text"'], ["{'a': 1}"]]
    if hint == Schedule:
        return [[""], ["many"], ["-1"], ["nan"], ["inf"], ["1", "1", "0"], ["1"] * 5]
    kinds = [hint, *typing.get_args(hint)]                  # `Count | None` holds Count
    rules = [rule for kind in kinds for rule in getattr(kind, "__metadata__", ())]
    words = []
    if typing.get_origin(hint) is typing.Literal:
        words = ["elephant", "", "GRU", "0"]
    elif rules:
        low, high = (inspect.getclosurevars(rules[0]).nonlocals[end] for end in ("low", "high"))
        words = ["", "many", "nan", "inf", "-inf", "[1]", low - 1, 2 * high + 1, MOST.get(name, high) + 1]
        words += ["1.5"] if type(low) is int and type(high) is int and int in kinds_of(kinds) else []
    elif hint is bool:
        return [["maybe"]]
    elif hint is int:                                       # seq_len
        words = ["", "many", "nan", "0", "-2", "1.5", MOST[name] + 1]
    return [[str(word)] for word in words]


def kinds_of(kinds):
    return [inner for kind in kinds for inner in (kind, *typing.get_args(kind))]


def accepted(*_):
    raise AssertionError("a run folder would be made now")


def flags_of_every_script():
    seen = set()
    for name in EVERY_SCRIPT:
        script = importlib.import_module(name)
        for flag, hint in typing.get_type_hints(script.Args, include_extras=True).items():
            wrong = wrong_values(flag, hint)
            if (flag, str(hint)) in seen:                   # a few: each script still has this flag refuse
                wrong = wrong[1::4]
            seen.add((flag, str(hint)))
            if wrong:
                marks = [pytest.mark.quick] if flag == "num_envs" else []
                yield pytest.param(script, flag, wrong, id=f"{name} {flag}", marks=marks)


@pytest.mark.parametrize("program, flag, wrong", flags_of_every_script())
def test_every_flag_refuses_what_its_type_excludes(program, flag, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "Run", accepted)
    flag = f"--{flag.replace('_', '-')}"
    for words in wrong:
        says = "maybe" if words == ["maybe"] else flag
        assert_refused(program, [flag, *words], says, capsys)


def test_there_are_enough_of_them():
    assert sum(len(case.values[2]) for case in flags_of_every_script()) > 500
    assert len(TYPED) * len(EVERY_SCRIPT) + sum(map(len, TOOLS.values())) > 300


# ---------------------------------------------------------------------- typed by people

TYPED = """
--memory ffm --hidden-size 3
--memory ffm --memory-kwargs {"contexts":1000}
--memory ffm --memory-kwargs {"contexts":2.5}
--memory lru --memory-kwargs {"state_size":0}
--memory lru --memory-kwargs {"state_size":1e12}
--memory lru --memory-kwargs {"r_max":1}
--memory lru --memory-kwargs {"r_min":0.9,"r_max":0.1}
--memory s5 --hidden-size 3
--memory s5 --memory-kwargs {"dt_min":0}
--memory s6 --memory-kwargs {"state_size":0}
--memory s6 --memory-kwargs {"dt_max":-1}
--memory deltanet --memory-kwargs {"heads":0}
--memory deltanet --memory-kwargs {"key_size":-4}
--memory linear-attention --memory-kwargs {"key_size":0}
--memory linear-attention --memory-kwargs {"heads":"two"}
--memory gpt --memory-kwargs {"window":0}
--memory gpt --memory-kwargs {"window":1}
--memory gpt --memory-kwargs {"window":1.5}
--memory gpt --memory-kwargs {"window":1000000000000}
--memory gpt --memory-kwargs {"head_size":0}
--memory gpt --hidden-size 3
--memory gru --memory-kwargs {"span":0}
--memory mingru --memory-kwargs {"span":NaN}
--memory none --memory-kwargs {"window":3}
--env-kwargs {"max_steps":0}
--env-kwargs {"max_steps":2.5}
--env-kwargs {"max_steps":null}
--num-layers 100000000
--num-threads 100000
--hidden-size 1000000000
--encoder-size 1000000000
--device cuda:99
--env-id nothing
--env-id os:PocMemory
--env-id nothing:PocMemory-v0
--model .
--model pipe
--model text
--resume .
--resume text
--wrong-flag 3
""".strip().splitlines()


def files_of_others():
    """In the working directory: a pipe that nobody writes to, and a text."""
    os.mkfifo("pipe")
    with open("text", "w") as f:
        f.write("not what you think")


@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_what_people_typed_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files_of_others()
    program = importlib.import_module(name)
    monkeypatch.setattr(program, "Run", accepted)
    for line in TYPED:
        flags = line.split()
        if "--env-id" not in flags:
            flags += ["--env-id", "PendulumMasked-v1" if name in CONTINUOUS else "PocMemory-v0"]
        assert_refused(program, flags, flags[0], capsys)


TOOLS = {
    "run": """
        |--only
        --workers 0 --only poc|--workers
        --workers 1000000000000 --only poc|--workers
        --workers many|--workers
        --suite nothing|--suite
        --only nothing|--only
        --seeds -1 --only poc|--seeds
        --seeds 1.5 --only poc|--seeds
        --tasks nowhere --only poc|--tasks
        --tasks text --only poc|--tasks
        --tasks pipe --only poc|--tasks
        --tasks . --only poc|--tasks
        --tasks one.toml --only poc|--tasks
        --tasks two.toml --only poc|--tasks
        --tasks three.toml --only poc|--tasks
        --runs-dir text --only poc|--runs-dir
        --runs-dir text/runs --only poc|--runs-dir
        --executor cloud|--executor
        --cpus-per-run nan --only poc|--cpus-per-run
        --gpus-per-run -1 --only poc|--gpus-per-run
        --suite|--suite
        --wrokers 3|perhaps you meant --workers
        poc|poc""",
    "plot": """
        --runs-dir nowhere|--runs-dir
        --runs-dir text|--runs-dir
        --runs-dir pipe|--runs-dir
        --runs-dir . --out out|--runs-dir
        --runs-dir torn --out text|--out
        --runs-dir torn --out text/out|--out
        --runs-dir torn --out torn|cannot be read
        --out other --runs-dir other|other
        --tasks nowhere|--tasks
        --tasks text|--tasks
        --tasks two.toml|--tasks
        --unfinished maybe|maybe
        --runs-dri runs|perhaps you meant --runs-dir""",
    "pages": """
        --page README.md|--page
        README.md|README.md""",
    "speed": """
        --tasks nothing|--tasks
        --ours sbb|--ours
        --ours sbb:elephant|--ours
        --ours sac:lru|--ours
        --ours sbb:lru:lstm|--ours
        --pqn elephant|--pqn
        --pqn tbb:lru|--pqn
        --dqn tbb:elephant|--dqn
        --dqn tbb:mingru|--dqn
        --off-policy sac_gru|--off-policy
        --off-policy ppo:gru|--off-policy
        --repeats 0|--repeats
        --repeats -3|--repeats
        --threads 0|--threads
        --threads 100000|--threads
        --num-layers 0|--num-layers
        --num-layers 100000000|--num-layers
        --memories --layer-size 0|--layer-size
        --memories --layer-size 1000000000|--layer-size
        --length -1|--length
        --length 1000000000000|--length
        --out .|--out
        --out text/out.csv|--out
        --out nowhere/out.csv|--out
        --devices cuda:99|cuda:99
        --child nothing|--child""",
    "every_task": """
        --ids nothing|--ids
        --ids CartPole-v1 nothing|nothing
        --ids CartPole-v1 --steps 0|--steps
        --ids CartPole-v1 --steps 1000000000|--steps
        --ids CartPole-v1 --seconds 0|--seconds
        --ids CartPole-v1 --seconds nan|--seconds
        --ids CartPole-v1 --out .|--out
        --ids CartPole-v1 --out text|--out
        --ids CartPole-v1 --out text/out.csv|--out
        --ids CartPole-v1 --out nowhere/out.csv|--out
        --ids CartPole-v1 --out pipe|--out
        --ids CartPole-v1 --out other/table.csv|--out""",
    "ship": """
        |entries
        nothing|nothing
        poc-gru --seed many|--seed
        poc-gru --seed -1|poc-gru
        poc-gru --runs-dir nowhere|poc-gru
        poc-gru --runs-dir text|poc-gru
        ../poc-gru|poc-gru
        poc-gru --episodes 0|--episodes
        poc-gru --episodes 1000000000000|--episodes
        foreign --runs-dir .|foreign
        folder --runs-dir .|folder
        empty --runs-dir .|empty""",
    "horizon": """
        |--model
        --model nowhere|--model
        --model text|--model
        --model .|--model
        --model pipe|--model
        --model foreign__1/model.safetensors|--model
        --model empty__1/model.safetensors|--model
        --model SHIPPED --steps 0|--steps
        --model SHIPPED --steps 1000000000|--steps
        --model SHIPPED --targets 0|--targets
        --model SHIPPED --episodes -1|--episodes
        --model SHIPPED --out text|--out
        --model SHIPPED --sweep max_steps|--sweep
        --model SHIPPED --sweep max_steps ten|--sweep
        --model SHIPPED --sweep max_steps 0|max_steps
        --model SHIPPED --sweep env-id nothing|nothing""",
    "truncation": """
        --memories elephant|--memories
        --lengths 0|--lengths
        --lengths many|--lengths
        --lengths 1000000000|--lengths
        --steps 0|--steps
        --steps 1000000000|--steps
        --distance -1|--distance
        --distance 104|--distance
        --out text|--out""",
    "discounted_return": """
        --lengths 0|--lengths
        --lengths 1000000000000|--lengths
        --columns 0|--columns
        --repeats 0|--repeats
        --max-seconds nan|--max-seconds
        --out text|--out""",
}
TOOLS = {name: [line.strip().split("|") for line in lines.splitlines()[1:]] for name, lines in TOOLS.items()}


@pytest.mark.parametrize("name", [pytest.param(tool, marks=pytest.mark.quick) for tool in TOOLS])
def test_the_tools_refuse_in_one_sentence(name, tmp_path, monkeypatch, capsys):
    tool = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    files_of_others()
    files = {
        "one.toml": "poc = 3", "two.toml": "[poc]\nseeds = [1]",
        "three.toml": '[poc]\ncommand = "a"\nseeds = 1',
        "torn/run/progress.csv": "global_step,seconds,charts/episodic_return\n1,2\nx,y,z\n",
        "other/table.csv": "value,seed\nmany,1\n"}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    metadata = {"script": "antigravity", "args": "{}"}
    (tmp_path / "folder__1/model.safetensors").mkdir(parents=True)
    for run_name, weights, of in (("foreign", {"x": torch.zeros(1)}, metadata),
                                  ("empty", {}, metadata | {"script": "ppo_recurrent_sbb"})):
        (tmp_path / f"{run_name}__1").mkdir()
        safetensors.torch.save_file(weights, tmp_path / f"{run_name}__1/model.safetensors", of)
    for line, says in TOOLS[name]:
        assert_refused(tool, line.replace("SHIPPED", str(SHIPPED)).split(), says, capsys)
    assert "antigravity" not in sys.modules


# ---------------------------------------------------------------------- files without weights

@pytest.mark.parametrize("weights, says", [
    (lambda own: {}, "holds no weights"),
    (lambda own: {name: x * float("nan") for name, x in own.items()}, "not numbers")])
def test_a_model_without_weights_is_refused(weights, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metadata = read_model(SHIPPED)
    own = metadata.pop("agent")
    safetensors.torch.save_file(weights(own), "model.safetensors", metadata)
    script = importlib.import_module(metadata["script"])
    assert_refused(script, ["--model", "model.safetensors"], says, capsys)


@pytest.mark.parametrize("script", ["ppo_recurrent_tbb", "sac_discrete_sbb", "td3_gru"], indirect=True)
def test_a_checkpoint_without_weights_is_refused(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, folder = run(tmp_path, script)
    capsys.readouterr()
    saved = read_checkpoint(folder)
    broken = {name: x * float("nan") for name, x in saved["agent"].items()}
    for agent in ({}, [], broken):
        torch.save({**saved, "agent": agent}, folder / "checkpoint.pt")
        assert_refused(script, ["--resume", str(folder)], "weights", capsys)
    assert json.loads((folder / "args.json").read_text())


# ---------------------------------------------------------------------- damaged in part

def checkpoint_of(script, tmp_path, capsys):
    """A run's folder, what its checkpoint holds, and the keys that a resume continues from."""
    _, folder = run(tmp_path, script)
    saved = read_checkpoint(folder)
    capsys.readouterr()
    for_people = {"torch", "gymnasium", "observation_space", "action_space"}
    return folder, saved, saved.keys() - for_people - {"script", "layout", "args", "agent"}


@pytest.mark.parametrize("script", ["ppo_recurrent_tbb", "dqn_recurrent_sbb", "sac_gru"], indirect=True)
def test_what_a_checkpoint_lacks_is_named(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, saved, used = checkpoint_of(script, tmp_path, capsys)
    for key in used:
        torch.save({name: x for name, x in saved.items() if name != key}, folder / "checkpoint.pt")
        assert_refused(script, ["--resume", str(folder), "--total-timesteps", "512"], f"no {key}", capsys)
    assert json.loads((folder / "args.json").read_text()) and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("script", ["ppo_recurrent_tbb", "dqn_recurrent_sbb", "td3_gru"], indirect=True)
def test_what_is_of_another_type_in_a_checkpoint_is_named(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, saved, used = checkpoint_of(script, tmp_path, capsys)
    assert used == HELD.keys() & saved.keys()
    for key in used:
        for other in ("text", {"a": 1}, [1]):
            if not isinstance(other, HELD[key]):
                torch.save({**saved, key: other}, folder / "checkpoint.pt")
                assert_refused(script, ["--resume", str(folder)], f"a {key} of another type", capsys)
    assert json.loads((folder / "args.json").read_text()) and not list(folder.glob("*.tmp"))


@pytest.mark.quick
@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_a_null_byte_in_a_folders_name_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = importlib.import_module(name)
    task = ["--env-id", "PendulumMasked-v1" if name in CONTINUOUS else "PocMemory-v0", "--device", "cpu"]
    for flag in ("--run-name", "--runs-dir", "--resume", "--model"):
        assert_refused(program, [*task, flag, "a\0b"], flag, capsys)


@pytest.mark.quick
def test_the_tools_that_start_at_once_import_no_torch():
    code = "import sys, run, plot, pages; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmark", check=True)


@pytest.mark.quick
@pytest.mark.parametrize("flag, value", [
    ("num_envs", "four"), ("num_envs", None), ("hidden_size", 8.5), ("hidden_size", [8]), ("seed", True),
    ("gamma", "a"), ("memory", "elephant"), ("memory", ["gru"]), ("env_id", 3), ("env_kwargs", 3),
    ("memory_kwargs", None), ("learning_rate", 1e-3), ("learning_rate", ["a"]), ("prev_action", "yes")])
def test_flags_of_another_type_in_a_model_file_are_named(flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metadata = read_model(SHIPPED)
    own, args = metadata.pop("agent"), json.loads(metadata["args"]) | {flag: value}
    safetensors.torch.save_file(own, "model.safetensors", metadata | {"args": json.dumps(args)})
    script = importlib.import_module(metadata["script"])
    assert_refused(script, ["--model", "model.safetensors"], f"--{flag.replace('_', '-')}", capsys)


@pytest.mark.quick
@pytest.mark.parametrize("argv, says", [
    (["--num-evns", "3"], "perhaps you meant --num-envs"), (["--num-envs", "many"], "--num-envs"),
    (["--memory", "elephant"], "'linear-attention'"), (["--seed"], "--seed"), (["PocMemory"], "PocMemory"),
    (["--prev-action", "maybe"], "maybe"), (["--zzz"], "--zzz")])
def test_what_tyro_refuses_is_one_sentence_with_a_remedy(argv, says, tmp_path, monkeypatch, capsys):
    import ppo_recurrent_tbb as ppo

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ppo.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.endswith(": see --help\n") or "meant" in says
    assert error.count("\n") == 1
