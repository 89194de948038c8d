"""Bugs of the loops, the tasks and the notes in the code, for plant.py. Each function plants one."""
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

from tests.conftest import DISCRETE, DISCRETE_OFF_POLICY, OFF_POLICY, PPO

PLANTS = {}
MULTIGPU = "ppo_recurrent_tbb_multigpu"
AS_TBB = "test_distributed.py::test_one_process_is_ppo_recurrent_tbb[False]"
SAC_DISCRETE_LOSSES = "test_sac_discrete.py::test_losses_equal_their_definition[{}-0.8]"
REPLAY_TEST = "test_what_enters_the_replay_is_what_happened"
TD3_LOSSES = "test_td3s_losses_equal_their_definition[0-1-CountInput-v0-1.0-2.0]"
TEST_FILES = {
    "dqn_recurrent_sbb": "test_dqn.py", "dqn_recurrent_tbb": "test_dqn.py", "sac_gru": "test_sac_td3.py",
    "td3_gru": "test_sac_td3.py", "sac_discrete_sbb": "test_sac_discrete.py"}


def plant(what, where, test, scripts=(None,)):
    """The function below is a plant, one for each script: {script} in `test` is its name."""
    def register(function):
        for script in scripts:
            name = function.__name__.replace("_", "-") + (f"-{script}" if script else "")
            at = where if not script else f"{where}, {script}.py"
            found = test(script) if callable(test) else test.replace("{script}", script or "")
            PLANTS[name] = what, at, found, with_module(function, script)
        return function
    return register


def with_module(function, script):
    return lambda: function(importlib.import_module(script)) if script else function()


def of_replay(script, test=REPLAY_TEST):
    """A test of one script's loop; the file of SAC-Discrete has no parameter for it."""
    one = "" if script == "sac_discrete_sbb" else f"[{script}]"
    return f"{TEST_FILES[script]}::{test}{one}"


def wrap(owner, name, around):
    """owner.name(*args) becomes around(original, *args)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def change_steps(script, change):
    """change(obs, reward, terminated, truncated, infos) of what the loop gets from its environments."""
    def planted(original, *args, **kwargs):
        envs = original(*args, **kwargs)
        wrap(envs, "step", lambda step, actions: change(*step(actions)))
        return envs
    wrap(script, "make_envs", planted)


def other_torch(module, **functions):
    """The module sees another torch, in which these functions are replaced."""
    module.torch = types.SimpleNamespace(**vars(torch) | functions)


def rewrite(script, old, new):
    """The script with `old`, which its source holds once, replaced."""
    source = Path(script.__file__).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{script.__name__}.py holds this {source.count(old)} times: {old}")
    exec(compile(source.replace(old, new), script.__file__, "exec"), vars(script))


def no_starts(x, *args, **kwargs):
    x = torch.as_tensor(x, *args, **kwargs)
    return torch.zeros_like(x) if x.dtype == torch.bool else x


# ---------------------------------------------------------------------- faults.md, C: loops

@plant("`done` is stored in place of `terminated`", "faults C", of_replay, OFF_POLICY)
def done_for_terminated(script):
    change_steps(script, lambda obs, r, terminated, truncated, infos: (
        obs, r, terminated | truncated, truncated, infos))


@plant("the last observation is the next episode's first", "faults C", of_replay, OFF_POLICY)
def next_first_for_last(script):
    def change(obs, reward, terminated, truncated, infos):
        for n in np.flatnonzero(terminated | truncated):
            infos["final_obs"][n] = obs[n]
        return obs, reward, terminated, truncated, infos
    change_steps(script, change)


@plant("acting never resets its state", "faults C",
       lambda script: of_replay(script, "test_acting_forgets_where_an_episode_starts_and_nowhere_else"),
       OFF_POLICY)
def acting_never_resets(script):
    other_torch(script, as_tensor=no_starts)


@plant("playing never resets its state", "faults C", "test_scripts.py::test_playing_forgets_between_episodes")
def play_never_resets():
    from models import play
    starts = []

    def first_only(x, *args, **kwargs):
        starts.append(x)
        x = torch.as_tensor(x, *args, **kwargs)
        return x if len(starts) == 1 else torch.zeros_like(x)
    other_torch(play, as_tensor=first_only)


@plant("forget_running does nothing", "faults C",
       lambda script: {"dqn_recurrent_tbb": "test_replay.py::test_a_tape_is_made_of_whole_observed_episodes",
                       "dqn_recurrent_sbb": "test_replay.py::test_segments_are_made_of_observed_steps",
                       "sac_gru": "test_sac_td3.py::test_sequences_are_made_of_observed_steps"}[script],
       (*DISCRETE_OFF_POLICY[:2], "sac_gru"))
def forget_running_does_nothing(script):
    replay = getattr(script, "SequenceReplay", None) or script.Replay
    replay.forget_running = lambda self: None


@plant("the sign of the entropy bonus is turned", "faults C",
       "test_ppo.py::test_the_entropy_bonus_raises_the_entropy[{script}]", PPO)
def entropy_sign(script):
    from models import distributions
    wrap(distributions.Categorical, "entropy", lambda original, self: -original(self))


@plant("schedules stay at their first value", "faults C",
       "test_ppo.py::test_the_learning_rate_follows_its_schedule[{script}]", PPO)
def schedule_not_applied(script):
    script.polynomial = lambda schedule, step, total_steps: schedule[0]


@plant("schedules stay at their first value", "faults C",
       "test_dqn.py::test_the_learning_rate_follows_its_schedule[{script}]", DISCRETE_OFF_POLICY[:2])
def schedule_constant(script):
    wrap(script, "polynomial", lambda original, schedule, step, total: original(schedule, 0, total))


@plant("the value after a time limit is taken with `start` true", "faults C",
       "test_ppo.py::test_last_observations_are_valued_by_the_state_that_acting_left[{script}]", PPO)
def value_after_a_time_limit_forgets(script):
    def planted(original, agent, last_obs, state):
        return original(agent, last_obs, tuple(torch.zeros_like(s) for s in state))
    wrap(script, "values_of", planted)


@plant("a gradient goes through the burn-in", "faults C",
       lambda script: f"{TEST_FILES[script]}::test_burn_in_has_no_gradient_and_both_networks_burn_in_alone",
       ("dqn_recurrent_sbb", "sac_discrete_sbb"))
def gradient_through_burn_in(script):
    def planted(original, agent, obs, state, start):
        online = next(agent.parameters()).requires_grad
        burns_in = len(start) > 1 and online and not torch.is_inference_mode_enabled()
        with torch.set_grad_enabled(burns_in or torch.is_grad_enabled()):
            return original(agent, obs, state, start)
    wrap(script.Agent, "forward", planted)


@plant("a gradient goes through the burn-in", "faults C",
       "test_sac_td3.py::test_burn_in_has_no_gradient_and_every_network_burns_in_alone[{script}]",
       ("sac_gru", "td3_gru"))
def gradient_through_burn_in_of_sequences(script):
    def planted(original, trunk, batch, i):
        stored = original(trunk, batch._replace(before=[x[:0] for x in batch.before]), i)
        *obs, starts = batch.before
        return trunk(obs, stored, starts)[1] if len(starts) else stored
    wrap(script, "state_at_first", planted)


@plant("the target's action is not clamped", "faults C, td3_gru.py",
       f"test_sac_td3.py::{TD3_LOSSES}")
def target_action_not_clamped():
    def planted(original, x, *bounds, **kwargs):
        in_loop = sys._getframe(2).f_globals["__name__"] == "td3_gru"
        if in_loop and bounds == (-1, 1) and not torch.is_inference_mode_enabled():
            return x
        return original(x, *bounds, **kwargs)
    wrap(torch.Tensor, "clamp", planted)


@plant("the state after the step is stored", "faults C",
       "test_dqn.py::test_stored_states_are_those_of_the_whole_episode[0-{script}-lstm]",
       ("dqn_recurrent_sbb", "sac_discrete_sbb"))
def stored_too_late(script):
    rewrite(script, "terminated, before, ended", "terminated, state, ended")


@plant("the state after the step is stored", "faults C",
       "test_sac_td3.py::test_stored_states_are_those_of_the_whole_episode[{script}-0-lstm]",
       ("sac_gru", "td3_gru"))
def stored_too_late_for_sequences(script):
    rewrite(script, "last_obs, before)", "last_obs, state)")


@plant("Key-to-Door keeps the key into the next episode", "faults C, envs/visual_match.py",
       "test_credit_envs.py::test_the_key_does_not_outlive_its_episode")
def key_is_kept():
    from envs.visual_match import KeyToDoorBatch

    def planted(original, self, rows):
        kept = self.has_key.copy()
        original(self, rows)
        self.has_key[rows] = kept[rows]
    wrap(KeyToDoorBatch, "explore", planted)


# ---------------------------------------------------------------------- notes in the code

@plant("a time limit is treated as death", "KNOWN BUG in gae", "test_ppo.py::test_gae_equals_its_definition",
       PPO)
def time_limit_is_death(script):
    def planted(original, rewards, values, starts, final_values, *rest, **kwargs):
        return original(rewards, values, starts, 0 * final_values, *rest, **kwargs)
    wrap(script, "gae", planted)


@plant("a time limit is treated as death", "PITFALL in td_targets",
       "test_dqn.py::test_td_targets_equal_their_definition[{script}]", DISCRETE_OFF_POLICY[:2])
def time_limit_is_death_in_targets(script):
    def planted(original, rewards, terminated, real, *rest):
        return original(rewards, terminated | (real & ~real.roll(-1, 0)), real, *rest)
    wrap(script, "td_targets", planted)


@plant("a sequence's last step is treated as death", "PITFALL in train",
       lambda script: "test_sac_td3.py::" + {
           "sac_gru": "test_losses_equal_their_definition[0-1-1-1-CountInput-v0]",
           "td3_gru": TD3_LOSSES}[script],
       ("sac_gru", "td3_gru"))
def last_step_is_death(script):
    rewrite(script, "~batch.terminated[:-1] * values",
            "~(batch.terminated[:-1] | ~batch.real[1:]) * values")


@plant("a segment's last step is treated as death", "PITFALL in train",
       SAC_DISCRETE_LOSSES.format("separate-truncated"), ("sac_discrete_sbb",))
def last_step_is_death_in_segments(script):
    rewrite(script, "args.gamma * ~batch.terminated,",
            "args.gamma * ~(batch.terminated | ~batch.real.roll(-1, 0)),")


@plant("None as hidden state: every call starts from zeros", "KNOWN BUG in models/rnn.py",
       "test_equations.py::test_a_memory_equals_its_equations[gru]")
def none_as_hidden_state():
    from models.rnn import GRU
    wrap(GRU, "forward", lambda original, self, x, state, start: original(
        self, x, self.initial_state(x.shape[1]), start))


@plant("+ 1e-6 in the log of 1 - tanh(u)^2", "PITFALL in models/distributions.py",
       "test_sac_td3.py::test_log_probabilities_are_those_of_the_squashed_normal")
def log_slope_with_epsilon():
    from models.distributions import SquashedGaussian

    def rsample(self):
        u = self.mean + self.log_std.exp() * torch.randn_like(self.mean)
        normal = torch.distributions.Normal(self.mean, self.log_std.exp())
        return u.tanh(), (normal.log_prob(u) - (1 - u.tanh() ** 2 + 1e-6).log()).sum(-1)
    SquashedGaussian.rsample = rsample


@plant("zero biases in place of the chrono initialisation", "DEVIATION in models/layers.py",
       "test_models.py::test_gates_remember_for_1_to_span_steps")
def no_chrono():
    import models  # noqa: F401  (whose modules hold chrono under its own name)
    for name, module in list(sys.modules.items()):
        if name.startswith("models.") and hasattr(module, "chrono"):
            module.chrono = lambda size, span: torch.zeros(size)


@plant("a Gaussian in the task's own units", "PITFALL in models/heads.py",
       "test_spaces.py::test_actions_in_the_environments_units")
def own_units():
    from models.heads import PolicyHead

    def planted(original, self, in_size, space):
        original(self, in_size, space)
        self.scale, self.centre = 1.0, 0.0
    wrap(PolicyHead, "__init__", planted)


@plant("linear attention's 1 + elu(x) as it is written", "PITFALL in models/matrix_memories.py",
       "test_models.py::test_low_keys_and_queries")
def elu_as_written():
    from models import matrix_memories
    matrix_memories.positive = lambda x: 1 + torch.nn.functional.elu(x)


@plant("a reset of the general scan is a factor", "PITFALL in models/scan.py",
       "test_scan.py::test_nan_crosses_a_zero")
def reset_is_a_factor():
    from models import scan
    other_torch(scan, where=lambda reset, new, old: reset * new + ~reset * old)


@plant("a loss that is not finite goes unnoticed", "PITFALL in models/scan.py",
       "test_scripts.py::test_a_loss_that_is_not_finite_is_named[ppo_recurrent_tbb]")
def not_finite_goes_unnoticed():
    from models.run_folder import Run
    Run.stop_if_not_finite = lambda self, loss, global_step: None


@plant("optimizer steps are not counted: pictures stay as other weights saw them",
       "PITFALL in models/views.py",
       "test_views.py::test_no_picture_is_remembered_from_other_weights[fused_step]")
def pictures_of_other_weights():
    import models.views  # noqa: F401

    sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks.clear()


@plant("MiniGrid's image has bounds of 0 and 255", "PITFALL in envs/wrappers.py",
       "test_spaces.py::test_minigrid_is_read_as_symbols")
def symbols_as_picture():
    from envs.wrappers import Symbols

    def planted(original, self, env):
        original(self, env)
        self.observation_space["image"] = env.observation_space["image"]
    wrap(Symbols, "__init__", planted)


@plant("doors are coloured once per environment object", "DEVIATION in envs/visual_match.py",
       "test_credit_envs.py::test_doors_get_new_colours_in_every_episode")
def doors_coloured_once():
    from envs.visual_match import VisualMatchBatch

    def planted(original, self, rows):
        before = self.colours.copy()
        original(self, rows)
        if before.any():
            self.colours[rows] = before[rows]
    wrap(VisualMatchBatch, "explore", planted)


@plant("all environments have one seed", "KNOWN BUG in envs/vector.py",
       "test_envs.py::test_environments_differ[Acrobot-v1]")
def one_seed():
    from gymnasium.vector import SyncVectorEnv

    def planted(original, self, *, seed=None, options=None):
        return original(self, seed=[seed] * self.num_envs, options=options)
    wrap(SyncVectorEnv, "reset", planted)


@plant("the step after an episode's end ignores the action and pays nothing",
       "PITFALL in envs/batch.py and envs/vector.py", "test_envs.py::test_no_phantom_transition")
def phantom_transition():
    from envs.batch import BatchEnv
    ended = {}

    def planted(original, self, actions):
        if ended.pop(self, False):
            nothing = np.zeros(self.num_envs, bool)
            return self.observe(), 0.0 * nothing, nothing, nothing, {}
        result = original(self, actions)
        ended[self] = (result[2] | result[3]).any()
        return result
    wrap(BatchEnv, "step", planted)


@plant("Gymnasium's own autoreset, in the next step", "PITFALL in envs/vector.py",
       "test_envs.py::test_no_phantom_transition_in_other_peoples_tasks")
def phantom_transition_of_others():
    from gymnasium.vector import AutoresetMode

    from envs import vector
    vector.AutoresetMode = types.SimpleNamespace(
        SAME_STEP=AutoresetMode.NEXT_STEP, DISABLED=AutoresetMode.DISABLED)


@plant("states are saved after the step", "KNOWN BUG in ppo_recurrent_sbb.py",
       "test_ppo_recurrent_sbb.py::test_first_logratio_is_zero[gru-1-{}]", ("ppo_recurrent_sbb",))
def state_saved_too_late(script):
    def planted(original, agent, obs, state, start, *mask):
        dist, value, after = original(agent, obs, state, start, *mask)
        if torch.is_inference_mode_enabled():
            for kept, new in zip(state, after):
                kept.copy_(new)
        return dist, value, after
    wrap(script.Agent, "forward", planted)


@plant("training starts from zeros", "PITFALL: segments or columns from initial_state()",
       "test_{script}.py::test_first_logratio_is_zero[gru-1-{}]", PPO)
def training_from_zeros(script):
    def planted(original, agent, obs, state, start, *rest):
        if torch.is_grad_enabled():
            state = tuple(torch.zeros_like(s) for s in state)
        return original(agent, obs, state, start, *rest)
    wrap(script.Agent, "forward", planted)


@plant("training starts from the newest state", "PITFALL: columns from the newest state",
       lambda script: {
           "ppo_recurrent_tbb": "test_ppo_recurrent_tbb.py::test_first_logratio_is_zero[gru-1-{}]",
           MULTIGPU: AS_TBB}[script],
       ("ppo_recurrent_tbb", MULTIGPU))
def training_from_the_newest_state(script):
    rewrite(script, "tuple(s[mb] for s in tape_state)", "tuple(s[mb] for s in state)")


@plant("steps ordered (segment, time) are reshaped to (time, segment)", "KNOWN BUG in ppo_recurrent_sbb.py",
       "test_ppo_recurrent_sbb.py::test_first_logratio_is_zero[gru-1-{}]")
def reshape():
    def planted(original, padded, index, real):
        mask, = index
        by_segment = padded.new_zeros(*mask.T.shape, padded.shape[-1])
        return original(by_segment, (mask.T,), real).view(padded.shape)
    wrap(torch.Tensor, "index_put_", planted)


@plant("rows are as many as the longest episode has", "KNOWN BUG in cut_segments",
       "test_ppo_recurrent_sbb.py::test_segments_partition_the_rollout", ("ppo_recurrent_sbb",))
def pads_to_the_longest_episode(script):
    wrap(script, "cut_segments", lambda original, starts, L: original(starts, len(starts)))


@plant("the newest two episodes are never drawn", "KNOWN BUG in Replay.sample",
       "test_replay.py::test_episodes_are_drawn_uniformly", ("dqn_recurrent_tbb",))
def newest_never_drawn(script):
    other_torch(script, randint=lambda n, shape: torch.randint(max(n - 2, 1), shape))


@plant("a segment starts from zeros", "PITFALL in dqn_recurrent_sbb.py",
       "test_dqn.py::test_stored_states_are_those_of_the_whole_episode[0-{script}-lstm]",
       ("dqn_recurrent_sbb", "sac_discrete_sbb"))
def segments_from_zeros(script):
    def planted(original, *args):
        batch = original(*args)
        return batch._replace(state=tuple(torch.zeros_like(s) for s in batch.state))
    wrap(script.Replay, "sample", planted)


@plant("sequences never begin at an episode's start on request", "PITFALL in SequenceReplay",
       "test_sac_td3.py::test_sequences_from_the_initial_state_hold_the_cue", ("sac_gru",))
def cue_is_missed(script):
    wrap(script.SequenceReplay, "draw_first_steps", lambda original, self, S, from_start: original(
        self, S, False))


@plant("all sequences are of one length", "PITFALL in draw_lengths",
       "test_sac_td3.py::test_lengths_are_those_ordered", ("sac_gru",))
def one_length(script):
    script.draw_lengths = lambda args: np.full(args.batch_size, args.seq_len)


@plant("the first policy is far from uniform", "DEVIATION: the policy's gain",
       "test_models.py::test_initial_policy_is_uniform")
def policy_gain():
    from models import heads, layers
    wrap(layers, "init", lambda original, layer, gain: original(layer, 1.0 if gain == 0.01 else gain))
    heads.init = layers.init


def with_flag(what, where, test, scripts, **flags):
    """The bug is there as a flag: train() has it on, whatever was ordered."""
    @plant(what, where, test, scripts)
    def set_flag(script):
        def planted(original, args, saved):
            vars(args).update(flags)
            return original(args, saved)
        wrap(script, "train", planted)
    for script in scripts:
        PLANTS["-".join([*flags, script]).replace("_", "-")] = PLANTS.pop(f"set-flag-{script}")


with_flag("targets do not see the first observation", "KNOWN BUG in train",
          "test_dqn.py::test_target_histories_contain_the_first_observation[{script}-whole]",
          DISCRETE_OFF_POLICY[:2], omit_first_obs=True)
with_flag("acting wipes the state every 2 steps", "KNOWN BUG in train",
          "test_sac_td3.py::test_acting_forgets_where_an_episode_starts_and_nowhere_else[{script}]",
          ("sac_gru", "td3_gru"), wipe_state_every=2)
with_flag("sequences start from zeros, whatever was stored", "PITFALL in train",
          "test_sac_td3.py::test_stored_states_are_those_of_the_whole_episode[{script}-0-lstm]",
          ("sac_gru", "td3_gru"), burn_in=None)
with_flag("targets from o_1 on only", "PITFALL in train",
          lambda script: "test_sac_td3.py::" + {
              "sac_gru": "test_losses_equal_their_definition[0-1-1-1-Cue-v0]",
              "td3_gru": TD3_LOSSES}[script],
          ("sac_gru", "td3_gru"), include_first_step_in_targets=False)
with_flag("the log-probability is of step t, the value of t + 1", "KNOWN BUG in train",
          "test_sac_td3.py::test_losses_equal_their_definition[0-1-1-1-CountInput-v0]", ("sac_gru",),
          entropy_bonus_next_step=False)
with_flag("all steps of a sequence but the last train not", "PITFALL: which steps train",
          "test_sac_td3.py::test_which_steps_train[{script}-False]", ("sac_gru", "td3_gru"),
          mask_non_terminal=True)
with_flag("the policy's loss moves the critics", "PITFALL in train",
          "test_sac_discrete.py::test_who_receives_a_gradient_of_which_loss[shared-frozen-lstm]",
          ("sac_discrete_sbb",), freeze_critic=False)
with_flag("the policy's loss moves the memory", "PITFALL in Agent.forward",
          "test_sac_discrete.py::test_who_receives_a_gradient_of_which_loss[shared-frozen-lstm]",
          ("sac_discrete_sbb",), freeze_memory=False)


@plant("padding counts as data", "KNOWN BUG in Replay.sample",
       "test_replay.py::test_both_arms_train_on_the_same_number_of_steps", ("dqn_recurrent_sbb",))
def padding_counts_as_data(script):
    wrap(script.Replay, "sample", lambda original, self, size, device: original(self, size // 2, device))


with_flag("a fixed temperature moves all the same", "KNOWN BUG in train",
          "test_sac_td3.py::test_the_temperature_is_fixed_or_moves_entropy_to_its_target", ("sac_gru",),
          autotune=True)


@plant("huber of the mean error, not the mean of huber", "KNOWN BUG in train",
       "test_dqn.py::test_segments_as_long_as_episodes_equal_the_tape[gru-popgym-MineSweeperEasy-v0]",
       ("dqn_recurrent_sbb",))
def huber_of_the_mean(script):
    def planted(q, targets, reduction):
        mean = (q - targets).abs().mean()
        return torch.nn.functional.smooth_l1_loss(mean, torch.zeros_like(mean)).expand_as(q)
    script.F = types.SimpleNamespace(**vars(script.F) | {"smooth_l1_loss": planted})


@plant("the entropy term counts padding", "KNOWN BUG in train",
       "test_sac_td3.py::test_losses_equal_their_definition[1-1-CountInput-v0]", ("sac_gru",))
def entropy_counts_padding(script):
    rewrite(script, "(alpha.detach() * logprobs[:-1] - q)[trained].mean()",
            "(alpha.detach() * logprobs[:-1]).mean() - q[trained].mean()")


@plant("the temperature counts padding", "KNOWN BUG in train",
       "test_sac_td3.py::test_losses_equal_their_definition[1-1-CountInput-v0]", ("sac_gru",))
def temperature_counts_padding(script):
    rewrite(script, "entropy = -logprobs[:-1][trained].mean()", "entropy = -logprobs[:-1].mean()")


@plant("the policy's loss counts padding", "KNOWN BUG: the mask left out",
       SAC_DISCRETE_LOSSES.format("separate-truncated"), ("sac_discrete_sbb",))
def policy_counts_padding(script):
    rewrite(script, "soft_value(policy, q, alpha.detach())[real].mean()",
            "soft_value(policy, q, alpha.detach()).mean()")


@plant("the temperature counts padding", "KNOWN BUG: the mask left out",
       SAC_DISCRETE_LOSSES.format("separate-truncated"), ("sac_discrete_sbb",))
def entropy_without_mask(script):
    rewrite(script, "entropy = policy.entropy()[real].mean()", "entropy = policy.entropy().mean()")


@plant("rewards are not scaled", "PITFALL in sac_discrete_sbb.py",
       SAC_DISCRETE_LOSSES.format("separate-truncated"), ("sac_discrete_sbb",))
def rewards_are_not_scaled(script):
    rewrite(script, "args.reward_scale * batch.rewards", "batch.rewards")


@plant("lambda-returns go on behind a segment's last step", "lambda_targets: the mask left out",
       SAC_DISCRETE_LOSSES.format("separate-truncated"), ("sac_discrete_sbb",))
def returns_go_on_behind_the_end(script):
    rewrite(script, "q_lambda * gain * real[t + 1]", "q_lambda * gain")


@plant("lambda-returns leave out the entropy", "lambda_targets: the bonus left out",
       SAC_DISCRETE_LOSSES.format("separate-two-branches"), ("sac_discrete_sbb",))
def returns_without_entropy(script):
    rewrite(script, "targets[t + 1] + bonuses[t + 1]", "targets[t + 1]")


@plant("target critics read the online memory", "DEVIATION: the target is whole",
       SAC_DISCRETE_LOSSES.format("shared-frozen-truncated"), ("sac_discrete_sbb",))
def target_reads_the_online_memory(script):
    rewrite(script, "= target(batch.obs, target_state_0", "= mixed(agent, target)(batch.obs, target_state_0")

    def mixed(agent, target):
        mixture = script.copy.deepcopy(target)
        mixture.memory.load_state_dict(agent.memory.state_dict())
        return mixture
    script.mixed = mixed


# ---------------------------------------------------------------------- several processes

TWO_EQUAL_ONE = "test_distributed.py::test_two_processes_equal_one"


def of_processes(name, what, old, new, test=TWO_EQUAL_ONE):
    """A line of the script for several processes is another one."""
    plant(what, "the script's docstring", test, (MULTIGPU,))(lambda script: rewrite(script, old, new))
    PLANTS[f"processes-{name}"] = PLANTS.pop(f"<lambda>-{MULTIGPU}")


of_processes("gradients-not-averaged", "every process steps along its own gradient",
             "average_gradients(parameters)\n                grad_norm", "grad_norm")
of_processes("gradients-summed", "gradients are summed, not averaged", "flat / WORLD_SIZE", "flat")
of_processes("advantages-apart", "every process normalises its own advantages",
             "of_all = gather(mb_advantages)", "of_all = mb_advantages")
of_processes("returns-apart", "every process scales rewards by its own returns",
             "update(gather(discounted_returns))", "update(discounted_returns)")
of_processes("observations-apart", "every process normalises its own observations",
             "tuple(gather(o).flatten(0, 1) for o in obs)", "tuple(o.flatten(0, 1) for o in obs)")
of_processes("kl-of-the-first", "--target-kl looks at the first process only",
             "gather(approx_kl.view(1, 1)).mean()", "gather(approx_kl.view(1, 1))[0, 0]")
of_processes("environments-alike", "all processes seed their environments alike",
             "args.seed + RANK * N", "args.seed")
of_processes("actions-alike", "all processes draw the same actions",
             "torch.manual_seed(seed + RANK)", "pass",
             "test_distributed.py::test_processes_play_different_episodes_and_a_resume_begins_new_ones")
of_processes("weights-differ", "processes begin with weights of their own",
             "torch.manual_seed(args.seed)\n", "torch.manual_seed(args.seed + RANK)\n")
of_processes("losses-of-the-first", "the log has the losses of the first process",
             "mean(0)[:, None]).mean(1)", "mean(0)[:, None])[:, 0]")
of_processes("episodes-of-the-first", "the log has the episodes of the first process",
             "episodes = gather(episodes)", "episodes = episodes")
of_processes("explained-variance-of-the-first", "the log has the explained variance of the first process",
             "gather(advantages).var() / gather(returns).var()", "advantages.var() / returns.var()")
of_processes("entropy-sign", "the sign of the entropy bonus is turned",
             "- ent_coef *", "+ ent_coef *", AS_TBB)
of_processes("schedule", "the learning rate stays at its first value",
             "polynomial(args.learning_rate, global_step,", "polynomial(args.learning_rate, 0,", AS_TBB)


PQN = "test_pqn.py::{}"
WHAT_TARGETS_ARE = PQN.format("test_what_targets_are_made_of")


@plant("the next episode's return is in the targets", "KNOWN BUG in pqn_recurrent_tbb.py",
       PQN.format("test_targets_equal_their_definition[0.9-0.65]"), ("pqn_recurrent_tbb",))
def the_next_episodes_return(script):
    rewrite(script, "decays = gamma * lam * goes_on ", "decays = gamma * lam * torch.ones_like(rewards) ")


@plant("a time limit is treated as death", "KNOWN BUG in pqn_recurrent_tbb.py",
       PQN.format("test_targets_equal_their_definition[0.9-0.65]"), ("pqn_recurrent_tbb",))
def pqns_time_limit_is_death(script):
    rewrite(script, " * next_values + final_values)", " * next_values)")


@plant("a death bootstraps", "pqn_recurrent_tbb.py, the rollout", WHAT_TARGETS_ARE, ("pqn_recurrent_tbb",))
def pqns_death_bootstraps(script):
    rewrite(script, "np.flatnonzero(truncated & ~terminated)", "np.flatnonzero(truncated | terminated)")


@plant("targets bootstrap from the action taken", "pqn_recurrent_tbb.py, the rollout", WHAT_TARGETS_ARE,
       ("pqn_recurrent_tbb",))
def values_of_the_action_taken(script):
    rewrite(script, "q.of(action)[0], q.of(q.greedy())[0]", "q.of(action)[0], q.of(action)[0]")


@plant("rewards are not scaled", "pqn_recurrent_tbb.py, the rollout", WHAT_TARGETS_ARE,
       ("pqn_recurrent_tbb",))
def pqns_rewards_are_not_scaled(script):
    rewrite(script, "args.reward_scale * reward", "reward")


@plant("columns start from the newest state", "PITFALL in pqn_recurrent_tbb.py",
       PQN.format("test_first_q_difference_is_zero[lru-1-{}]"), ("pqn_recurrent_tbb",))
def pqns_columns_from_the_newest_state(script):
    rewrite(script, "tuple(s[mb] for s in tape_state)", "tuple(s[mb] for s in state)")


@plant("training does not know where episodes start", "pqn_recurrent_tbb.py, the update",
       PQN.format("test_first_q_difference_is_zero[lru-1-{}]"), ("pqn_recurrent_tbb",))
def pqns_columns_without_starts(script):
    rewrite(script, "mb_state, starts[:, mb])", "mb_state, torch.zeros_like(starts[:, mb]))")


@plant("no LayerNorm", "DEVIATION in pqn_recurrent_tbb.py",
       PQN.format("test_layer_norm_bounds_the_action_values"), ("pqn_recurrent_tbb",))
def no_layer_norm(script):
    rewrite(script, "nn.Sequential(hidden, nn.LayerNorm(args.mlp_size))", "nn.Sequential(hidden)")


# ---------------------------------------------------------------------- action masks

WITH_MASKS = *PPO, MULTIGPU, *DISCRETE
OBEYED = "test_masks.py::test_masks_are_kept_with_their_observations_and_obeyed[{script}-two branches-ours]"
UNUSED = "test_masks.py::test_targets_never_use_a_forbidden_action[{script}-two branches]"


@plant("the target's best action may be a forbidden one", "PITFALL in models/heads.py", UNUSED,
       DISCRETE_OFF_POLICY[:2])
def forbidden_in_the_target(script):
    rewrite(script, "target_q.of(next_q.greedy())",
            "target_q.of(torch.stack([q.argmax(-1) for q in next_q.branches], dim=-1))")


@plant("the target's best action may be a forbidden one", "PITFALL in models/heads.py", UNUSED,
       ("pqn_recurrent_tbb",))
def forbidden_in_q_lambda(script):
    rewrite(script, "q.of(action)[0], q.of(q.greedy())[0]",
            "q.of(action)[0], sum(x.amax(-1) for x in q.branches)[0]")


@plant("the policy has its mask in acting only", "models/heads.py",
       lambda script: (OBEYED if script in (*PPO, MULTIGPU) else UNUSED).replace("{script}", script),
       (*PPO, MULTIGPU, "sac_discrete_sbb"))
def mask_in_acting_only(script):
    from models.heads import PolicyHead
    wrap(PolicyHead, "forward", lambda original, self, y, mask=None: original(
        self, y, mask if torch.is_inference_mode_enabled() else None))


@plant("the entropy is that of all actions", "models/heads.py", UNUSED, (*PPO, MULTIGPU))
def entropy_of_all_actions(script):
    from models.heads import PolicyHead

    def planted(original, self, y, mask=None):
        dist = original(self, y, mask)
        dist.entropy = original(self, y).entropy
        return dist
    wrap(PolicyHead, "forward", planted)


@plant("exploration draws from all actions", "models/heads.py", OBEYED, DISCRETE_OFF_POLICY[:2])
def epsilon_greedy_without_mask(script):
    from models.heads import ActionValues
    original = ActionValues.random
    ActionValues.random = staticmethod(lambda q, mask: original(q, None))


@plant("the allowed actions are not equally likely to be drawn", "models/heads.py",
       "test_masks.py::test_exploration_is_uniform_over_the_allowed_actions_of_each_branch")
def forbidden_draws_become_the_first_allowed():
    from models import heads
    other_torch(heads, rand=lambda shape, **kwargs: torch.zeros(shape))


@plant("evaluation and --model have no mask", "Agent.act", OBEYED, WITH_MASKS)
def evaluation_without_mask(script):
    def planted(original, self, obs, state, start):
        obs = tuple(torch.ones_like(o) if o.dtype == torch.int8 else o for o in obs)
        return original(self, obs, state, start)
    wrap(script.Agent, "act", planted)


@plant("the last observation has the next episode's mask", "train", OBEYED, WITH_MASKS)
def mask_of_the_next_episode(script):
    def change(obs, reward, terminated, truncated, infos):
        for n in np.flatnonzero(terminated | truncated):
            infos["final_obs"][n] = {**infos["final_obs"][n], "action_mask": obs["action_mask"][n]}
        return obs, reward, terminated, truncated, infos
    change_steps(script, change)


@plant("at an autoreset the mask is the old episode's", "envs/wrappers.py",
       "test_masks.py::test_every_form_of_mask_becomes_the_same_leaf[one branch-info]")
def mask_of_the_old_episode():
    from envs.wrappers import Masked
    last = {}

    def step(original, self, action):
        result = original(self, action)
        last[self] = result[0][1]
        return result

    def reset(original, self, **kwargs):
        (obs, mask), info = original(self, **kwargs)
        return (obs, last.get(self, mask)), info
    wrap(Masked, "step", step)
    wrap(Masked, "reset", reset)


@plant("masks of the prefix are put on the steps after it", "Agent.forward", OBEYED,
       ("ppo_recurrent_tbb", MULTIGPU))
def masks_of_the_prefix(script):
    rewrite(script, "self.encoder.mask(obs, prefix)", "self.encoder.mask(obs)[:len(y)]")


@plant("a forbidden action has a logit of -inf", "models/heads.py",
       "test_masks.py::test_where_nothing_is_allowed_nothing_is_nan")
def logits_of_minus_infinity():
    wrap(torch.Tensor, "masked_fill", lambda original, x, where, _: original(x, where, -torch.inf))


# ---------------------------------------------------------------------- flags that a file holds

@plant("--flags takes over where the other run was, and what it sent to others", "models/begin_with.py",
       "test_coming_from.py::test_flags_of_a_run_an_args_json_and_a_model_file[ppo_recurrent_tbb]")
def flags_of_one_run_are_taken_over():
    importlib.import_module("models.begin_with").NOT_TAKEN_OVER = set()


@plant("--flags wins over the flags that are given", "models/flags.py, parse",
       "test_coming_from.py::test_flags_of_a_run_an_args_json_and_a_model_file[ppo_recurrent_tbb]")
def flags_of_a_file_win():
    wrap(importlib.import_module("models.flags"), "command_line",
         lambda original, Args, argv, default=None: default or original(Args, argv))


@plant("--flags takes the flags of another script", "models/begin_with.py",
       "test_coming_from.py::test_flags_of_others_are_refused_and_name_the_script[ppo_recurrent_tbb]")
def flags_of_another_script():
    importlib.import_module("models.begin_with").refuse_flags_of_another = lambda *args: None


# ---------------------------------------------------------------------- looking into an agent

@plant("a wipe leaves the state as it is", "models/play.py, play",
       "test_watch.py::test_a_wiped_state_costs_the_tmaze_agent_its_return_and_a_memoryless_one_nothing")
def wipe_that_wipes_nothing():
    importlib.import_module("models.play").wiped = lambda state, empty, rows: state


@plant("a wipe empties the state of every environment", "models/play.py, wiped",
       "test_watch.py::test_only_the_rows_that_are_at_the_step_are_wiped")
def wipe_of_every_row():
    importlib.import_module("models.play").wiped = lambda state, empty, rows: empty if rows.any() else state


@plant("the readout is tested on the episodes that it was fitted to", "models/probe.py, accuracy",
       "test_watch.py::test_a_readout_is_linear_knows_an_order_and_is_tested_on_what_it_was_not_fitted_to")
def readout_tested_on_what_it_was_fitted_to():
    probe = importlib.import_module("models.probe")

    def twice(accuracy, x, y):
        half = len(x) // 2
        return accuracy(np.concatenate([x[:half]] * 2), np.concatenate([y[:half]] * 2))
    wrap(probe, "accuracy", twice)


@plant("what is drawn as forgetting is the GRU's reset gate", "models/insight.py, note_rnn",
       "test_watch.py::test_what_is_kept_is_what_a_difference_of_states_is_multiplied_with[gru]")
def reset_gate_for_the_update_gate():
    def linear(x, w, b):
        reset, update, new = torch.nn.functional.linear(x, w, b).chunk(3, dim=-1)
        return torch.cat([update, reset, new], dim=-1)
    importlib.import_module("models.insight").F = types.SimpleNamespace(linear=linear)


@plant("attention is drawn of keys that are not rotated", "models/insight.py, note_attention",
       "test_watch.py::test_attention_is_what_the_transformer_multiplies_its_values_with")
def attention_without_positions():
    insight, gpt = importlib.import_module("models.insight"), importlib.import_module("models.gpt")

    def without(note, steps, block, args, out):
        x, keys, values, mask, turns = args
        return note(steps, block, (x, keys, values, mask, torch.ones_like(turns)), out)
    note = insight.NOTED[gpt.Block]
    insight.NOTED[gpt.Block] = lambda *args: without(note, *args)


@plant("each half of a film has rows and scales of its own", "models/watch.py, films_of",
       "test_watch.py::test_both_halves_of_a_film_have_the_same_rows_and_scales")
def halves_that_cannot_be_compared():
    watch = importlib.import_module("models.watch")
    wrap(watch, "strip", lambda strip, agent, steps, part, *rest: strip(
        agent, steps[part], slice(None), *rest))


# ---------------------------------------------------------------------- trained agents in other programs

def rewrite_policy(old, new):
    policy = importlib.import_module("models.policy")
    rewrite(policy, old, new)
    importlib.import_module("models.play").load = policy.load


@plant("load: the next episode sees the last one's action and reward", "models/policy.py",
       "test_policy.py::test_many_environments_at_once[everything]")
def actions_of_the_last_episode():
    rewrite_policy("if start.any():", "if first:")


@plant("load imports whatever script a file names", "models/policy.py",
       "test_policy.py::test_a_strangers_file_is_one_sentence_and_runs_nothing[script]")
def any_script_is_imported():
    rewrite_policy("if name not in SCRIPTS:", "if not name:")


@plant("load imports whatever module a file's task names", "models/policy.py",
       "test_policy.py::test_a_strangers_file_is_one_sentence_and_runs_nothing[module]")
def any_module_is_imported():
    rewrite_policy("if module and module not in sys.modules:", "if not args.env_id:")


@plant("--export keeps a file whatever it computes", "models/export.py",
       "test_export.py::test_a_file_that_acts_otherwise_is_not_written")
def exports_are_not_compared():
    importlib.import_module("models.export").largest_difference = lambda *args: 0.0


@plant("--export: i times i is 1", "models/real.py", "test_export.py::test_every_memory[lru-2-.pt2]")
def wrong_complex_product():
    real = importlib.import_module("models.real")
    real.multiply = lambda x, y: real.Pair(
        x.real * y.real + x.imag * y.imag, x.real * y.imag + x.imag * y.real)
