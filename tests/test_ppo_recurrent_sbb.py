"""ppo_recurrent_sbb.py: its pure functions, the invariant of recurrent PPO and the bugs it catches, resume, bad input."""
import csv
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import safetensors
import torch
import torch.nn as nn

import ppo_recurrent_sbb as ppo
from models import MEMORIES

SMALL = dict(env_kwargs='{"max_steps": 11}', num_envs=4, num_steps=32, total_timesteps=4 * 32 * 3, num_minibatches=3,
             hidden_size=8, mlp_size=8, seq_len=5, learning_rate=(1e-2,), ent_coef=(1e-3,), update_epochs=2, device="cpu")


def run(tmp_path, script=ppo, resume_from=None, **changes):
    """Train in this process; returns the rows of progress.csv and the run folder."""
    args = script.Args(**{**SMALL, "runs_dir": str(tmp_path), "run_name": "run", **changes})
    script.check(args)
    folder = script.train(args, script.load("--resume", args.resume, script.read_checkpoint) if args.resume else None)
    return list(csv.DictReader((folder / "progress.csv").open())), folder


def weights_of(folder):
    return ppo.load("--model", folder / "model.safetensors", ppo.read_model)["agent"]


def column(rows, name):
    return [float(row[name]) for row in rows if row[name]]


# ---------------------------------------------------------------------- pure functions

@pytest.mark.parametrize("L", [1, 3, 8, 40])
def test_segments_partition_the_rollout(L):
    torch.manual_seed(L)
    T, N = 32, 4
    starts = torch.rand(T, N) < 0.2
    when, env, mask = ppo.cut_segments(starts, L)
    assert when.shape == mask.shape == (int(mask.sum(0).max()), len(env)) and len(when) <= L    # as long as the longest
    seen = torch.zeros(T, N, dtype=torch.long)
    seen.index_put_((when[mask], env.expand(len(when), -1)[mask]), torch.tensor(1), accumulate=True)
    assert (seen == 1).all()                                                    # every step exactly once
    assert not (starts[when, env] & mask)[1:].any()                             # a segment holds steps of one episode
    assert (mask.long().diff(dim=0) <= 0).all() and mask[0].all()               # padding only at the end
    assert (when.diff(dim=0)[mask[1:]] == 1).all()                              # consecutive in time
    after = when[0] > 0
    before_is_start = starts[when[0], env] | (mask.new_tensor([(w - s) % L == 0 for w, s in zip(
        when[0].tolist(), [max([0] + [t for t in range(w + 1) if starts[t, e]]) for w, e in zip(when[0], env)])]))
    assert before_is_start[after].all()                                         # no cut without a reason


def test_gae_equals_its_definition():
    torch.manual_seed(0)
    T, N, gamma, lam = 12, 3, 0.9, 0.8
    rewards, values, next_value = torch.randn(T, N), torch.randn(T, N), torch.randn(N)
    starts, next_start = torch.rand(T, N) < 0.3, torch.tensor([True, False, False])
    starts1, values1 = torch.cat([starts, next_start[None]]), torch.cat([values, next_value[None]])
    time_limit = starts1[1:] & (torch.rand(T, N) < 0.5)                         # these ends are truncations
    final_values = torch.where(time_limit, torch.randn(T, N), 0)
    advantages = ppo.gae(rewards, values, starts, final_values, next_value, next_start, gamma, lam)
    for n in range(N):
        for t in range(T):                                                      # sum_k (gamma lam)^k delta_{t+k}
            total, weight = 0.0, 1.0
            for k in range(t, T):
                after = final_values[k, n] if starts1[k + 1, n] else values1[k + 1, n]
                total += weight * (rewards[k, n] + gamma * after - values[k, n])
                weight *= gamma * lam
                if starts1[k + 1, n]:
                    break
            torch.testing.assert_close(advantages[t, n], torch.as_tensor(total))


@pytest.mark.parametrize("schedule, at_0, at_50, at_100, at_150", [
    ((3.0,), 3, 3, 3, 3),
    ((3.0, 1.0), 3, 2, 1, 1),
    ((3.0, 1.0, 2.0), 3, 1.5, 1, 1),
    ((3.0, 1.0, 1.0, 50), 3, 1, 1, 1),
])
def test_polynomial_schedules(schedule, at_0, at_50, at_100, at_150):
    assert [ppo.polynomial(schedule, step, 100) for step in (0, 50, 100, 150)] == pytest.approx([at_0, at_50, at_100, at_150])


# ---------------------------------------------------------------------- what is trained is what acted

@pytest.mark.parametrize("changes", [{}, {"seq_len": -1}, {"seq_len": 1}, {"burn_in": 3}, {"reset_state": False},
                                     {"prev_action": True, "prev_reward": True}, {"norm_obs": True, "norm_reward": True}],
                         ids=lambda c: "-".join(c) or "plain")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("memory", MEMORIES)
def test_first_logratio_is_zero(tmp_path, memory, layers, changes):
    """Before the first gradient step of every update, stored and recomputed log-probabilities agree. Episodes of at most
    11 steps end inside rollouts and segments of 5."""
    rows, _ = run(tmp_path, memory=memory, num_layers=layers, **changes)
    assert len(rows) == 3 and max(column(rows, "debug/first_logratio")) < 1e-5
    assert max(column(rows, "debug/padding")) > 1 or changes.get("seq_len") == 1
    assert max(column(rows, "losses/approx_kl")) > 1e-6                         # and then the policy did move


def planted(tmp_path, *replacements):
    """The script with a bug planted in its source, as a module."""
    source = Path(ppo.__file__).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"the script no longer contains {old!r}"
        source = source.replace(old, new)
    path = tmp_path / "ppo_recurrent_sbb.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", path)
    sys.modules["planted"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_caught(tmp_path, capsys, *replacements, **changes):
    rows, _ = run(tmp_path, planted(tmp_path, *replacements), **changes)
    assert max(column(rows, "debug/first_logratio")) > 1e-3
    assert "the policy in training is not the one that acted" in "".join(capsys.readouterr())


def test_classic_bug_none_as_hidden_state(tmp_path, capsys):
    """None for the state of every call: torch silently takes zeros, in acting and in training."""
    assert_caught(tmp_path, capsys, ("y, state = self.memory(x, state, start) ",
                                     "y, state = self.memory(x, self.memory.initial_state(x.shape[1]), start) "))


def test_classic_bug_reshape(tmp_path, capsys):
    """Steps ordered (segment, time) reshaped to (time, segment)."""
    assert_caught(tmp_path, capsys, ("x = x.new_zeros(*mask.shape, x.shape[-1]).index_put_((mask,), x) ",
                                     "x = x.new_zeros(*mask.T.shape, x.shape[-1]).index_put_((mask.T,), x).view("
                                     "*mask.shape, -1) "))


def test_classic_bug_state_saved_too_late(tmp_path, capsys):
    """The state is saved after the step has moved it."""
    assert_caught(tmp_path, capsys, ("            states.append(state)\n", ""),
                  ("                action = dist.sample() ", "                states.append(state)\n"
                   "                action = dist.sample() "))


def test_pitfall_segments_from_zero_state(tmp_path, capsys):
    assert_caught(tmp_path, capsys, ("seg_state = tuple(s[when[0], col] for s in states)",
                                     "seg_state = tuple(torch.zeros_like(s[when[0], col]) for s in states)"))


# ---------------------------------------------------------------------- padding, gradients, burn-in

def agent_and_batch(memory="lstm", **changes):
    """An agent and one batch of segments of a random rollout."""
    torch.manual_seed(0)
    args = ppo.Args(**{**SMALL, "memory": memory, **changes})
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2), args).double()
    T, N = 20, 3
    obs, starts = torch.randn(T, N, 3, dtype=torch.float64), torch.rand(T, N) < 0.2
    when, env, mask = ppo.cut_segments(starts, 6)
    state = tuple(torch.randn(len(env), *s.shape[1:], dtype=torch.float64) for s in agent.memory.initial_state(1))
    index, start = (when * N + env)[mask], starts[when, env] & mask
    return agent, obs, index, state, start, mask


@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_can_hold_anything(memory):
    """Garbage in the padding changes no output and no gradient: the mask, not its content, decides."""
    agent, obs, index, state, start, mask = agent_and_batch(memory)
    agent.encoder = nn.Identity()
    real = obs.flatten(0, 1)[index]

    def outputs(garbage):
        agent.zero_grad()
        x = torch.full((*mask.shape, 3), garbage, dtype=torch.float64).index_put_((mask,), real)
        y, _ = agent.memory(x, state, start)
        y[mask].square().sum().backward()
        return y[mask].detach(), [p.grad.clone() for p in agent.memory.parameters()]

    torch.testing.assert_close(outputs(0.0), outputs(1e9), rtol=0, atol=0)
    dist, value, _ = agent(real, state, start, mask)                            # the agent pads with zeros itself
    assert value.shape == dist.entropy().shape == (int(mask.sum()),)
    y, _ = agent.memory(torch.zeros(*mask.shape, 3, dtype=torch.float64).index_put_((mask,), real), state, start)
    torch.testing.assert_close(value, agent.value(agent.hidden(y[mask]).relu().chunk(2, -1)[1]).squeeze(-1))


def test_gradient_stops_at_the_segments_edge():
    """Truncated BPTT: a step's output depends on the inputs of its own segment up to itself, and on nothing else."""
    agent, obs, index, state, start, mask = agent_and_batch("gru", mlp_size=64)
    agent.encoder = nn.Identity()
    real = obs.flatten(0, 1)[index].requires_grad_()
    _, value, _ = agent(real, state, start, mask)
    rows, segment = mask.nonzero(as_tuple=True)                                 # of the M real steps
    for m in range(0, len(value), 5):
        (grad,) = torch.autograd.grad(value[m], real, retain_graph=True)
        reaches = grad.abs().sum(-1) > 0
        assert (reaches == ((segment == segment[m]) & (rows <= rows[m]))).all()


def test_burn_in_refreshes_stored_states(tmp_path):
    """With today's weights, the refreshed state is what the segment before leads to, however stale the stored one."""
    module = planted(tmp_path, ("                dist, newvalue, _ = agent(",
                                "                if args.burn_in and c.any():\n"
                                "                    seen.append((seg_state[0][mb[c]], mb_state[0][c], agent(tuple(o[at] for o "
                                "in obs), tuple(s[first] for s in states), memory_starts[at])[2][0], at, memory_starts[at]))\n"
                                "                dist, newvalue, _ = agent("))
    module.seen = seen = []
    run(tmp_path, module, memory="gru", burn_in=5, learning_rate=(0.05,))
    for stored, used, fresh, (when, _), start in seen:
        torch.testing.assert_close(used, fresh)                                 # what trains is the refreshed state
        assert (when.diff(dim=0) == 1).all() and not start[1:].any()            # from consecutive steps of one episode
    drift = [(stored - used).abs().max().item() for stored, used, *_ in seen]
    assert drift[0] < 1e-5 < 1e-3 < drift[5]                                    # 6 minibatches an update: then stale


def test_normalisation_travels_with_the_model(tmp_path):
    _, folder = run(tmp_path, norm_obs=True, norm_reward=True)
    content = ppo.load("--model", folder / "model.safetensors", ppo.read_model)
    weights, args = content["agent"], content["args"]
    assert weights["encoder.leaves.0.stats.count"] == weights["return_stats.count"] == args.total_timesteps
    assert args.norm_obs and args.norm_reward and args.device == "cpu"


def test_rewards_are_scaled_by_the_spread_of_discounted_returns(tmp_path):
    torch.manual_seed(0)
    rewards, starts, before = torch.randn(9, 2), torch.rand(9, 2) < 0.3, torch.randn(2)
    out = ppo.discount(rewards, starts, before, 0.9)
    for n in range(2):
        total = before[n]
        for t in range(9):
            total = rewards[t, n] + (0 if starts[t, n] else 0.9 * total)
            torch.testing.assert_close(out[t, n], total)
    module = planted(tmp_path, ("            rewards /= ", "            seen.append((rewards.clone(), discounted_returns))\n"
                                "            rewards /= "), ("            advantages = gae(rewards,",
                                "            seen[-1] += (rewards.clone(),)\n            advantages = gae(rewards,"))
    module.seen = seen = []
    run(tmp_path, module, norm_reward=True)
    gathered = torch.cat([returns for _, returns, _ in seen])                   # [3 T, N]
    torch.testing.assert_close(seen[-1][2] * gathered.std(correction=0), seen[-1][0], rtol=1e-4, atol=1e-6)


def test_the_value_loss_is_ppos_clipped_one_and_target_kl_stops_the_epochs(tmp_path):
    module = planted(tmp_path, ("                loss = pg_loss -",
                                "                seen.append((newvalue, b_values[index], b_returns[index], v_loss, "
                                "clip_coef))\n                loss = pg_loss -"))
    module.seen = seen = []
    run(tmp_path, module, learning_rate=(0.05,))
    for new, old, returns, v_loss, clip in seen:
        near = torch.minimum(torch.maximum(new, old - clip), old + clip)
        expected = 0.5 * torch.stack([(new - returns) ** 2, (near - returns) ** 2]).max(0).values.mean()
        torch.testing.assert_close(v_loss, expected)
    assert any(((new - old).abs() > clip).any() for new, old, _, _, clip in seen) and len(seen) == 3 * 2 * 3
    seen.clear()
    run(tmp_path / "stopped", module, learning_rate=(0.05,), target_kl=1e-9)
    assert len(seen) == 3 * 1 * 3                                               # one epoch of three minibatches an update


def test_a_minibatch_of_one_step_trains(tmp_path):
    rows, folder = run(tmp_path, num_envs=1, num_steps=8, seq_len=1, num_minibatches=8, total_timesteps=32)
    assert len(rows) == 4 and all(w.isfinite().all() for w in weights_of(folder).values())


def test_burn_in_with_images_and_nothing_to_burn(tmp_path):
    rows, _ = run(tmp_path, env_id="MinigridMemory-v0", env_kwargs="{}", num_steps=16, seq_len=16, burn_in=4)
    assert len(rows) == 6


def test_a_time_limit_is_bootstrapped_and_a_death_is_not(tmp_path):
    module = planted(tmp_path, ("            advantages = gae(rewards,",
                                "            seen.append((final_values.clone(), starts.clone(), next_start.clone()))\n"
                                "            advantages = gae(rewards,"),
                     ("                final_values[t, time_limit] = value[0]\n",
                      "                final_values[t, time_limit] = value[0]\n"
                      "                for i, n in enumerate(time_limit):\n"
                      "                    assert (last_obs[0][0, i].numpy() == infos['final_obs'][n]).all()\n"
                      "                    alone = agent((last_obs[0][:, [i]],), tuple(s[[n]] for s in state), "
                      "goes_on[:, [i]])\n"
                      "                    torch.testing.assert_close(final_values[t, n], alone[1][0, 0])\n"))
    module.seen = seen = []
    run(tmp_path, module, env_kwargs='{"max_steps": 2}')                        # nothing but time limits
    for final_values, starts, next_start in seen:
        ends = torch.cat([starts[1:], next_start[None]])
        assert ((final_values != 0) == ends).all() and ends.any()
    module.seen.clear()
    run(tmp_path / "b", module, env_kwargs='{"max_steps": 1000}')               # nothing but deaths
    assert all((final_values == 0).all() for final_values, _, _ in seen)


# ---------------------------------------------------------------------- run folder, resume, signals

def comparable(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "charts/SPS") and not k.startswith("time/")} for row in rows]


@pytest.mark.parametrize("changes", [
    {"memory": "lstm", "learning_rate": (1e-2, 1e-3, 2.0, 300)},
    {"memory": "gru", "norm_obs": True, "norm_reward": True, "prev_action": True, "eval_every": 128, "eval_episodes": 3},
])
def test_resume_equals_never_having_stopped(tmp_path, changes):
    whole, folder = run(tmp_path, run_name="whole", **changes)
    _, half = run(tmp_path, run_name="half", total_timesteps=4 * 32 * 2, **changes)
    rows, half = run(tmp_path, resume=str(half), **changes)
    assert comparable(rows) == comparable(whole)
    for name, weight in weights_of(folder).items():
        assert torch.equal(weight, weights_of(half)[name]), name


def test_same_seed_same_numbers_another_seed_others(tmp_path):
    a, b, c = (comparable(run(tmp_path, run_name=name, seed=seed)[0]) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b != c


def test_resume_drops_rows_after_the_checkpoint(tmp_path):
    rows, folder = run(tmp_path)
    with (folder / "progress.csv").open("a") as f:
        f.write("99999999" + "," * (len(rows[0]) - 1) + "\n")
    resumed, _ = run(tmp_path, resume=str(folder), total_timesteps=4 * 32 * 4)
    assert column(resumed, "global_step") == [128, 256, 384, 512]


def test_other_peoples_tasks_and_another_number_of_environments_resume_with_new_episodes(tmp_path):
    changes = dict(env_id="popgym-RepeatPreviousEasy-v0", env_kwargs="{}", prev_action=True)
    _, folder = run(tmp_path, **changes)
    rows, folder = run(tmp_path, resume=str(folder), total_timesteps=4 * 32 * 4, **changes)
    assert column(rows, "global_step") == [128, 256, 384, 512] and max(column(rows, "debug/first_logratio")) < 1e-5
    _, folder = run(tmp_path / "ours")
    rows, _ = run(tmp_path / "ours", resume=str(folder), num_envs=5, total_timesteps=384 + 5 * 32)
    assert column(rows, "global_step")[-1] == 384 + 5 * 32


def test_run_folder_holds_what_design_says(tmp_path):
    rows, folder = run(tmp_path, eval_every=256, eval_episodes=5)
    assert {"args.json", "progress.csv", "model.safetensors", "checkpoint.pt"} <= {p.name for p in folder.iterdir()}
    assert any(p.name.startswith("events.out.tfevents") for p in folder.iterdir())
    assert list(rows[0])[:2] == ["global_step", "seconds"] and list(rows[0])[2:] == ppo.TAGS
    assert [bool(row["eval/episodic_return"]) for row in rows] == [False, True, False]
    assert json.loads((folder / "args.json").read_text())["num_envs"] == 4
    with safetensors.safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata()["script"] == "ppo_recurrent_sbb" and f.metadata()["global_step"] == "384"


AS_TEXT = {**SMALL, "learning_rate": "1e-2", "ent_coef": "1e-3"}
FLAGS = [x for k, v in AS_TEXT.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def wait_for(path, seconds=120):
    deadline = time.time() + seconds
    while not path.exists():
        assert time.time() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_ctrl_c_saves_and_exits_0_and_sigkill_leaves_only_whole_files(tmp_path, run_script):
    def start(*flags):
        return run_script("ppo_recurrent_sbb.py", *FLAGS, "--total-timesteps", 10**8, "--checkpoint-every", 128, *flags)

    process = start("--runs-dir", tmp_path, "--run-name", "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    steps = []
    for _ in range(2):
        wait_for(checkpoint)
        time.sleep(random.uniform(0.5, 2.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append(ppo.read_checkpoint(tmp_path / "run")["global_step"])      # whole, whenever the kill came
        assert weights_of(tmp_path / "run")
        rows = list(csv.reader((tmp_path / "run" / "progress.csv").open()))
        assert all(len(row) == len(rows[0]) for row in rows)
        before = checkpoint.stat().st_mtime_ns
        process = start("--resume", tmp_path / "run")
        while checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "interrupted at step" in stdout and f"--resume {tmp_path / 'run'}" in stdout
    steps.append(ppo.read_checkpoint(tmp_path / "run")["global_step"])
    assert steps[0] <= steps[1] < steps[2]
    column_of_steps = [int(r["global_step"]) for r in csv.DictReader((tmp_path / "run" / "progress.csv").open())]
    assert column_of_steps == list(range(128, steps[2] + 1, 128))               # no row lost, none twice


def test_enjoy(tmp_path, capsys):
    _, folder = run(tmp_path, prev_action=True)
    ppo.main(["--model", str(folder / "model.safetensors"), "--episodes", "2"])
    out = capsys.readouterr().out
    assert "A" in out and "episode 2: return" in out and "success" in out       # text frames by default
    ppo.main(["--model", str(folder / "model.safetensors"), "--episodes", "1", "--render-mode", "rgb_array"])
    assert (folder / "model.gif").stat().st_size > 0
    with pytest.raises(SystemExit):
        ppo.main(["--model", str(folder / "model.safetensors"), "--render-mode", "ansi", "--env-id", "CartPole-v1",
                  "--env-kwargs", "{}"])
    assert "--render-mode ansi is not one of CartPole-v1's: human, rgb_array" in capsys.readouterr().err


@pytest.mark.parametrize("env_id", ["popgym-RepeatPreviousEasy-v0", "popgym-AutoencodeEasy-v0", "popgym-CountRecallEasy-v0",
                                    "popgym-BattleshipEasy-v0", "popgym-PositionOnlyPendulumEasy-v0", "CartPole-v1",
                                    "CartPoleMasked-v0"])
def test_every_kind_of_task_trains_and_plays(tmp_path, env_id, capsys):
    rows, folder = run(tmp_path, env_id=env_id, env_kwargs="{}", prev_action=True, prev_reward=True, eval_every=128,
                       eval_episodes=2)
    assert max(column(rows, "debug/first_logratio")) < 1e-4 and column(rows, "eval/episodic_return")
    ppo.main(["--model", str(folder / "model.safetensors"), "--episodes", "1", "--render-mode", "none"])
    assert "mean of 1: return" in capsys.readouterr().out


@pytest.mark.parametrize("kwargs", ["{}", '{"rgb": false}'])
def test_images_and_symbols_train(tmp_path, kwargs):
    rows, _ = run(tmp_path, env_id="MinigridMemory-v0", env_kwargs=kwargs, encoder_size=16)
    assert max(column(rows, "debug/first_logratio")) < 1e-5


def test_mortar_mayhem_grid_runs_with_reset_options(tmp_path):
    pytest.importorskip("memory_gym", reason="pip install --no-deps memory-gym==1.0.2")
    rows, _ = run(tmp_path, env_id="MortarMayhem-Grid-v0", env_kwargs="{}", num_envs=2, seq_len=-1, num_minibatches=2,
                  total_timesteps=128, num_steps=64, reset_options='{"command_count": [2], "explosion_delay": [2]}')
    assert max(column(rows, "charts/episodic_length")) < 30                     # two commands, not ten


# ---------------------------------------------------------------------- bad input

BAD = {
    "--env-id PocMemry-v0": "PocMemory",
    "--env-id MiniGrid-MemoryS9-v0": "not supported",
    '--env-kwargs {"colour":1}': "colour",
    "--env-kwargs [1": "--env-kwargs",
    "--reset-options 3": "--reset-options",
    '--reset-options {"size":1}': "no reset options",
    "--num-minibatches 1000": "do not fit",
    "--num-envs -1": "--num-envs",
    "--hidden-size 0": "--hidden-size",
    "--seq-len 0": "--seq-len",
    "--seq-len 4 --burn-in 5": "--burn-in",
    "--learning-rate 1 1 1 1 1": "--learning-rate",
    "--total-timesteps 100": "--total-timesteps",
    "--seed -1": "--seed",
    "--device warp": "--device",
    "--memory elephant": "memory",
    "--model nowhere.safetensors": "does not exist",
    "--model README.md": "cannot be read",
    "--resume nowhere": "does not exist",
    "--learning-rate -1": "--learning-rate",
    "--learning-rate nan": "--learning-rate",
    "--ent-coef 1e-3 1e-4 1 0": "--ent-coef",
    "--ent-coef 1e-3 1e-4 -1": "--ent-coef",
    "--clip-coef -0.2": "--clip-coef",
    "--gamma nan": "--gamma",
    "--gamma 1.5": "--gamma",
    "--seed 99999999999999999999": "--seed",
    "--device meta": "--device",
    '--env-id MinigridMemory-v0 --env-kwargs {"size":8}': "--env-kwargs",
    '--env-kwargs {"max_steps":"ten"}': "--env-kwargs",
    "--run-name taken": "--run-name",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, flags):
    (tmp_path / "taken").mkdir()
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--runs-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[flags] in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1 or "--memory" in flags          # that one is tyro's own box
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and not list((tmp_path / "taken").iterdir())


def test_files_of_others_are_refused(tmp_path, capsys):
    _, folder = run(tmp_path)
    model, checkpoint = folder / "model.safetensors", folder / "checkpoint.pt"
    capsys.readouterr()

    def refused(*argv):
        with pytest.raises(SystemExit) as stop:
            ppo.main(list(argv))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.strip().splitlines()) == 1
        return error

    data = model.read_bytes()
    model.write_bytes(data[: len(data) // 2])                                   # torn in transfer
    assert "cannot be read" in refused("--model", str(model))
    for metadata in ({"script": "ppo_recurrent_sbb"}, {"script": "ppo_recurrent_sbb", "args": "{"}, {}):
        safetensors.torch.save_file({"w": torch.zeros(2)}, model, metadata)
        assert "cannot be read" in refused("--model", str(model))
    safetensors.torch.save_file({"w": torch.zeros(2)}, model, {"script": "dqn_recurrent_tbb", "args": "{}"})
    assert "dqn_recurrent_tbb" in refused("--model", str(model))
    model.write_bytes(data)
    assert "other sizes" in refused("--model", str(model), "--hidden-size", "9")
    assert "other sizes" in refused("--resume", str(folder), "--hidden-size", "9", "--total-timesteps", "1000")
    torch.save({"script": os.system}, checkpoint)                               # a pickle that names a function
    assert "cannot be read" in refused("--resume", str(folder))
    torch.save([1, 2], checkpoint)
    assert "cannot be read" in refused("--resume", str(folder))


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(SystemExit, match="not finite at step 128; the last checkpoint is"):
        run(tmp_path, planted(tmp_path, ("loss = pg_loss -", "loss = float('nan') * pg_loss -")))
    assert all(w.isfinite().all() for w in weights_of(tmp_path / "run").values())


# ---------------------------------------------------------------------- learning

@pytest.mark.parametrize("memory, low, high", [("gru", 0.98, 1.0), ("none", 0.0, 0.85)])
def test_poc_memory_is_learned_with_memory_only(tmp_path, memory, low, high):
    args = ppo.Args(memory=memory, runs_dir=str(tmp_path), run_name="run", total_timesteps=40_960, device="cpu")
    folder = ppo.train(args)
    best = max(column(list(csv.DictReader((folder / "progress.csv").open())), "charts/success")[5:])
    assert low <= best <= high
