"""Action masks: what a task forbids is never done, valued or learned from; a mask of ones changes nothing."""
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

from envs import vector
from envs.batch import BatchEnv, single
from models import Encoder, PolicyHead, QHead, to_tensors
from models.action_mask import ActionMask
from models.encoder import leaves
from models.views import Views
from sac_discrete_sbb import soft_value
from tests.conftest import DISCRETE, PPO
from tests.helpers import comparable, run, spy, weights_of

MASKED = *PPO, "ppo_recurrent_tbb_multigpu", *DISCRETE
SIZES = {"one branch": [4], "two branches": [3, 2]}
PICTURES = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), np.uint8)
every_script = pytest.mark.parametrize("script", MASKED, indirect=True)
both_spaces = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def space_of(sizes):
    return Discrete(sizes[0], start=2) if len(sizes) == 1 else MultiDiscrete(sizes, start=[1] * len(sizes))


def draw(generator, sizes, num_envs):
    """[N, sum(sizes)] masks: about half of the actions, at least one of each branch, the very first never."""
    masks, begin = generator.random((num_envs, sum(sizes))) < 0.5, 0
    for size in sizes:
        masks[np.arange(num_envs), begin + generator.integers(begin == 0, size, num_envs)] = True
        begin += size
    masks[:, 0] = False
    return masks.astype(np.int8)


class MaskedBatch(BatchEnv):
    """What is observed is the mask itself, and the time. Episodes end by death or by a time limit.

    gives: the mask that agents get: the one drawn, ones, zeros from the third step on, or none
    sees: mask and time as numbers, or a picture of the time, numbered (Views) or not
    """

    def __init__(self, num_envs=1, sizes=(4,), gives="drawn", sees="numbers", **kwargs):
        self.sizes, self.gives, self.sees = list(sizes), gives, sees
        space = space_of(self.sizes)
        seen = {"numbers": Box(0, 9, (sum(sizes) + 1,), np.float32), "views": Views(PICTURES),
                "pictures": Box(0, 255, PICTURES.shape[1:], np.uint8)}[sees]
        parts = {"observation": seen, "action_mask": ActionMask(space)}
        if gives == "none":
            del parts["action_mask"]
        super().__init__(Dict(parts), space, num_envs, **kwargs)
        self.t, self.length = np.zeros((2, num_envs), int)
        self.by_death = np.zeros(num_envs, bool)
        self.masks = np.zeros((num_envs, sum(sizes)), np.int8)

    def begin(self, rows):
        self.t[rows], self.masks[rows] = 0, draw(self.np_random, self.sizes, len(rows))
        self.length[rows] = self.np_random.integers(3, 7, len(rows))
        self.by_death[rows] = self.np_random.random(len(rows)) < 0.5

    def move(self, actions):
        actions = actions.reshape(self.num_envs, -1) - self.single_action_space.start
        if self.gives == "drawn":
            firsts = np.cumsum(self.sizes) - self.sizes
            assert np.take_along_axis(self.masks, actions + firsts, 1).all(), (actions, self.masks)
        reward = (actions.sum(1) + self.t + self.masks.sum(1)) % 3 - 1.0
        self.t = self.t + 1
        self.masks = draw(self.np_random, self.sizes, self.num_envs)
        ended = self.t == self.length
        return reward, ended & self.by_death, ended & ~self.by_death, None

    def observe(self):
        seen = {"numbers": np.c_[self.masks, self.t].astype(np.float32), "views": self.t.copy(),
                "pictures": PICTURES[self.t]}[self.sees]
        obs = {"observation": seen}
        masks = {"drawn": self.masks.copy(), "ones": np.ones_like(self.masks),
                 "zeros": self.masks * (self.t < 3)[:, None]}
        return obs if self.gives == "none" else {**obs, "action_mask": masks[self.gives]}


gym.register("Masked-v0", single(MaskedBatch), vector_entry_point=MaskedBatch)


class MaskedStranger(gym.Env):
    """The same of other people's: a mask in the info, or shown; flat, or a tuple; after a death all zeros.

    array: the mask that it gives again and again in one array, with new numbers
    fault: what it gives in the third step in place of the mask
    """

    def __init__(self, sizes=(4,), shown=False, as_tuple=False, gives="drawn", fault="", render_mode=None):
        self.batch = MaskedBatch(1, sizes, gives, autoreset_mode="Disabled")
        self.shown, self.as_tuple, self.gives, self.fault = shown, as_tuple, gives, fault
        self.action_space, self.array = self.batch.single_action_space, np.zeros(sum(sizes), np.int8)
        parts = {"observation": Box(0, 9, (sum(sizes) + 1,), np.float32)}
        spaces = [Box(0, 1, (size,), np.int8) for size in sizes]
        parts["action_mask"] = Tuple(spaces) if as_tuple else Box(0, 1, (sum(sizes),), np.int8)
        self.observation_space = Dict(parts) if shown else parts["observation"]

    def given(self, obs, dead=False):
        self.array[:] = 0 if dead else obs["action_mask"][0]
        mask = self.array
        if self.fault and self.batch.t[0] == 3:
            mask = {"nothing": 0 * mask, "short": mask[1:], "missing": None}[self.fault]
        if self.as_tuple:
            mask = tuple(np.split(mask, np.cumsum(self.batch.sizes)[:-1]))
        obs, masks = obs["observation"][0] * (not dead), {} if mask is None else {"action_mask": mask}
        return ({"observation": obs, **masks}, {}) if self.shown else (obs, masks)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.batch.np_random = self.np_random
        return self.given(self.batch.reset()[0])

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.batch.step([action])
        obs, info = self.given(obs, terminated[0])
        return obs, reward[0], terminated[0], truncated[0], info


gym.register("MaskedStranger-v0", MaskedStranger)
INFO, SHOWN = {"shown": False}, {"shown": True}
FORMS = {"info": INFO, "shown": SHOWN, "info-tuple": {**INFO, "as_tuple": True},
         "shown-tuple": {**SHOWN, "as_tuple": True}}
TASKS = {"ours": ("Masked-v0", {})} | {name: ("MaskedStranger-v0", form) for name, form in FORMS.items()}
CASES = [*((script, "two branches", "ours") for script in MASKED),
         *((script, "one branch", "info") for script in MASKED),
         *((script, sizes, name) for script, sizes in (("ppo_recurrent_tbb", "one branch"),
                                                       ("dqn_recurrent_sbb", "two branches"))
           for name in ("shown", "info-tuple", "shown-tuple"))]
cases = pytest.mark.parametrize(
    "script, sizes, name", [pytest.param(script, SIZES[sizes], name, id=f"{script}-{sizes}-{name}")
                            for script, sizes, name in CASES], indirect=["script"])


def task(env_id="Masked-v0", **env_kwargs):
    return dict(env_id=env_id, env_kwargs=env_kwargs)


# ---------------------------------------------------------------------- whole runs: the tasks assert that

@cases
def test_masks_are_kept_with_their_observations_and_obeyed(script, tmp_path, monkeypatch, sizes, name):
    """The tasks assert it, and show in every observation the mask that belongs to it.

    In acting, bootstrapping and training, in prefixes, replays and segments; also with the previous action.
    """
    env_id, form = TASKS[name]
    calls = spy(monkeypatch, script.Agent, "forward")
    previous = name != "info"
    rows, folder = run(
        tmp_path, script, eval_every=128, eval_episodes=3, prev_action=previous, prev_reward=previous,
        full_episodes=True, start_e=0.5, end_e=0.5, seq_len=2, burn_in=1, target_entropy=0.3,
        **task(env_id, sizes=sizes, **form))
    script.main(["--model", str(folder / "model.safetensors"), "--episodes", "3", "--render-mode", "none"])
    assert any(call.training for call in calls) and any(not call.training for call in calls)
    for call in calls:
        mask = next(leaf for leaf in call.args[1] if leaf.dtype == torch.int8)
        shown = next(leaf for leaf in call.args[1] if leaf.shape[-1:] == (sum(sizes) + 1,))[..., :-1]
        dead = ~shown.bool().any(-1, keepdim=True)          # shows zeros, where nothing is chosen
        assert ((mask == shown) | dead).all() and mask.any(-1).all()
    for tag in ("debug/first_logratio", "debug/first_q_difference"):
        assert all(float(row.get(tag) or 0) < 1e-5 for row in rows)


@both_spaces
@every_script
def test_targets_never_use_a_forbidden_action(script, tmp_path, monkeypatch, sizes):
    """Action 0 is never allowed. Its logit and its Q are huge: every other weight stays the same, to the bit.

    So it is in no sample, no log-probability, no entropy, no expectation, no greedy action and no target.
    """
    changes = dict(eval_every=128, eval_episodes=3, target_entropy=0.3, **task(sizes=sizes))
    rows, folder = run(tmp_path, script, run_name="modest", **changes)
    for head in (PolicyHead, QHead):
        def proud(self, *args, original=head.__init__):
            original(self, *args)
            self.linear.bias.data[0] = 1e6
        monkeypatch.setattr(head, "__init__", proud)
    rows_of_proud, folder_of_proud = run(tmp_path, script, run_name="proud", **changes)
    weights, weights_of_proud = weights_of(folder), weights_of(folder_of_proud)
    huge = [name for name in weights if (weights_of_proud[name] - weights[name]).abs().max() > 9e5]
    assert len(huge) == (3 if script.__name__ == "sac_discrete_sbb" else 1)
    for name in huge:
        weights_of_proud[name][0] = weights[name][0]
    torch.testing.assert_close(weights_of_proud, weights, rtol=0, atol=0)
    assert comparable(rows_of_proud) == comparable(rows)


@cases
def test_a_mask_of_ones_changes_nothing_to_the_bit(script, tmp_path, sizes, name):
    env_id, form = TASKS[name]
    changes = dict(
        total_timesteps=256, eval_every=128, eval_episodes=3, prev_action=True, prev_reward=True,
        norm_obs=True)
    ones, folder = run(
        tmp_path, script, run_name="ones", **changes, **task(env_id, sizes=sizes, gives="ones", **form))
    none, folder_of_none = run(
        tmp_path, script, run_name="none", **changes, **task(sizes=sizes, gives="none")
        if name == "ours" else {"action_mask": False, **task(env_id, sizes=sizes, gives="ones", **form)})
    torch.testing.assert_close(weights_of(folder), weights_of(folder_of_none), rtol=0, atol=0)
    assert comparable(ones) == comparable(none)


@every_script
def test_a_resume_continues_to_the_bit(script, tmp_path):
    changes = dict(full_episodes=True, checkpoint_every=128, **task(sizes=[3, 2]))
    whole, folder = run(tmp_path, script, run_name="whole", **changes)
    run(tmp_path, script, run_name="half", **changes | dict(total_timesteps=128))
    resumed, folder_of_resumed = run(tmp_path, script, resume=str(tmp_path / "half"), **changes)
    assert comparable(resumed) == comparable(whole)
    torch.testing.assert_close(weights_of(folder_of_resumed), weights_of(folder), rtol=0, atol=0)


@every_script
def test_without_masks_what_is_forbidden_is_tried(script, tmp_path):
    with pytest.raises((AssertionError, SystemExit)):       # of the task's, when it is tried before the run
        run(tmp_path, script, action_mask=False, **task("MaskedStranger-v0"))


# ---------------------------------------------------------------------- heads

def heads_and_mask(sizes, shape):
    """A policy and action values with clear preferences, and a mask.   shape: [...] of features"""
    torch.manual_seed(0)
    policy, values = PolicyHead(5, space_of(sizes)), QHead(5, space_of(sizes))
    for head in (policy, values):
        head.linear.weight.data.mul_(100)
    mask = torch.from_numpy(draw(np.random.default_rng(0), sizes, int(np.prod(shape)))).bool()
    return policy, values, torch.randn(*shape, 5), mask.view(*shape, -1)


def allowed(action, mask, sizes):
    """[...] whether each action is allowed.   action: [...] of one branch, [..., K] of several"""
    action = action.view(*mask.shape[:-1], len(sizes))
    return torch.stack([part.gather(-1, a[..., None]).squeeze(-1)
                        for part, a in zip(mask.split(sizes, -1), action.unbind(-1))]).all(0)


@pytest.mark.quick
@both_spaces
def test_of_a_million_draws_none_is_forbidden(sizes):
    policy, values, y, mask = heads_and_mask(sizes, (1000, 1000))
    with torch.no_grad():
        dist, q = policy(y, mask), values(y, mask)
    for action in (dist.sample(), dist.mode(), q.greedy(), q.epsilon_greedy(0.3), q.epsilon_greedy(1.0)):
        assert allowed(action, mask, sizes).all()


@pytest.mark.quick
@both_spaces
def test_exploration_is_uniform_over_the_allowed_actions_of_each_branch(sizes):
    _, values, y, mask = heads_and_mask(sizes, (1, 1))
    y, mask = y.expand(100_000, 1, -1), mask.expand(100_000, 1, -1)
    drawn = values(y, mask).epsilon_greedy(1.0).view(-1, len(sizes))
    rows = [row.tolist() for row in drawn.unique(dim=0)]
    shares = [(drawn == torch.tensor(row)).all(1).float().mean().item() for row in rows]
    choices = int(np.prod([part[0].sum().item() for part in mask.split(sizes, -1)]))
    assert len(rows) == choices > 1 and shares == pytest.approx([1 / choices] * choices, abs=0.01)


@pytest.mark.quick
@both_spaces
def test_log_probabilities_are_those_of_the_allowed_actions_alone(sizes):
    policy, _, y, mask = heads_and_mask(sizes, (50,))
    dist, action = policy(y, mask), policy(y, mask).sample()
    logits = policy.linear(y).split(sizes, -1)
    for i in range(50):
        log_prob, entropy, actions = 0.0, 0.0, action.view(50, -1)[i]
        for branch, allowed_here, a in zip(logits, mask.split(sizes, -1), actions):
            ref = torch.distributions.Categorical(logits=branch[i][allowed_here[i]])
            log_prob += ref.log_prob(allowed_here[i][:a].sum())
            entropy += ref.entropy()
        torch.testing.assert_close(dist.log_prob(action)[i], log_prob)
        torch.testing.assert_close(dist.entropy()[i], entropy)


@pytest.mark.quick
@both_spaces
def test_the_gradient_to_what_is_forbidden_is_exactly_zero(sizes):
    policy, values, y, mask = heads_and_mask(sizes, (50,))
    mask = mask[:1].expand(50, -1)                          # always the same
    critics, action = QHead(5, space_of(sizes)), policy(y, mask).sample().view(50, -1)
    dist, q, unmasked = policy(y, mask), values(y, mask), critics(y)
    losses = dist.log_prob(action.squeeze(-1)) + dist.entropy() + q.of(q.greedy()) + q.of(action)
    (losses + soft_value(dist, unmasked.branches, 0.1)).sum().backward()
    for head in (policy, values, critics):
        forbidden = ~mask[0]
        assert (head.linear.bias.grad[forbidden] == 0).all() and head.linear.bias.grad.any()
        assert (head.linear.weight.grad[forbidden] == 0).all() and head.linear.weight.grad.isfinite().all()


@pytest.mark.quick
@both_spaces
def test_where_nothing_is_allowed_nothing_is_nan(sizes):
    """Padding, and behind a death. 0 x nan is nan."""
    policy, values, y, mask = heads_and_mask(sizes, (50,))
    mask = mask & (torch.arange(50) % 2 == 0)[:, None]
    dist, q = policy(y, mask), values(y, mask)
    action = dist.sample()
    outputs = [dist.log_prob(action), dist.entropy(), q.of(q.epsilon_greedy(1.0)), q.of(q.greedy()),
               soft_value(dist, q.branches, 0.1)]
    loss = (torch.stack(outputs) * mask.any(-1)).sum()
    loss.backward()
    assert loss.isfinite() and all(x.isfinite().all() for x in outputs)
    assert all(p.grad.isfinite().all() for head in (policy, values) for p in head.parameters())


@pytest.mark.quick
@both_spaces
def test_exploration_draws_the_same_with_a_mask_of_ones_and_without(sizes):
    _, values, y, mask = heads_and_mask(sizes, (200, 3))
    draws = []
    for given in (None, torch.ones_like(mask)):
        torch.manual_seed(1)
        draws.append((values(y, given).epsilon_greedy(0.5), torch.rand(3)))
    torch.testing.assert_close(*draws, rtol=0, atol=0)


# ---------------------------------------------------------------------- at the door

@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@both_spaces
def test_every_form_of_mask_becomes_the_same_leaf(sizes, form):
    """At an autoreset it is the new episode's; the last observation has its own, ones after a death."""
    import ppo_recurrent_tbb as ppo

    args = ppo.Args(**task("MaskedStranger-v0", sizes=sizes, **form))
    envs = vector.make_envs(args, 3)
    space = envs.single_observation_space
    where, = (i for i, part in enumerate(leaves(space)) if isinstance(part, ActionMask))
    assert len(leaves(space)) == 2 and leaves(space)[where] == ActionMask(envs.single_action_space)
    obs, ends = envs.reset(seed=1)[0], {"dead": 0, "late": 0}
    for _ in range(60):
        found = leaves(space, obs)
        assert found[where].dtype == np.int8 and (found[where] == found[1 - where][:, :-1]).all()
        obs, _, terminated, truncated, infos = envs.step(vector.any_actions(envs, obs))
        assert not infos.keys() & {"action_mask"}
        for n in np.flatnonzero(terminated | truncated):
            found = leaves(space, infos["final_obs"][n])
            assert (found[where] == (1 if terminated[n] else found[1 - where][:-1])).all()
            ends["dead" if terminated[n] else "late"] += 1
    assert min(ends.values()) > 2


@pytest.mark.quick
@pytest.mark.parametrize("name", TASKS)
def test_no_action_mask_leaves_no_leaf(name):
    import ppo_recurrent_tbb as ppo

    env_id, form = TASKS[name]
    args = ppo.Args(**task(env_id, gives="ones", **form), action_mask=False)
    envs = vector.make_envs(args, 3)
    space, (obs, _) = envs.single_observation_space, envs.reset(seed=1)
    assert [part.shape for part in leaves(space)] == [(5,)] and len(leaves(space, obs)) == 1
    assert Encoder(space).mask(to_tensors(space, obs, "cpu")) is None


@pytest.mark.quick
@pytest.mark.parametrize("sees", ["views", "pictures"])
@pytest.mark.parametrize("script", [MASKED[1], *DISCRETE[-2:]], indirect=True)
def test_pictures_have_masks_too(script, tmp_path, sees):
    """Numbered or not, shrunk, in tables: a mask of ones changes nothing, one that is drawn is obeyed."""
    changes = dict(shrink_images=2, encoder_size=8, prev_action=True, total_timesteps=128)
    folders = [run(tmp_path, script, run_name=gives, **changes, **task(sees=sees, gives=gives))[1]
               for gives in ("ones", "none", "drawn")]
    ones, none, _ = map(weights_of, folders)
    torch.testing.assert_close(ones, none, rtol=0, atol=0)


@pytest.mark.quick
@both_spaces
def test_the_previous_action_stands_beside_the_mask(sizes):
    """The mask is a leaf inside of the others then."""
    import ppo_recurrent_tbb as ppo

    for env_id, form in TASKS.values():
        args = ppo.Args(prev_action=True, prev_reward=True, **task(env_id, sizes=sizes, **form))
        envs = vector.make_envs(args, 3)
        space, (obs, _) = envs.single_observation_space, envs.reset(seed=1)
        encoder = Encoder(space)
        assert encoder.out_size == sum(sizes) + 1 + sum(sizes) + len(sizes) + 1
        for _ in range(20):
            tensors = to_tensors(space, obs, "cpu")
            shown = next(leaf for leaf in tensors if leaf.shape == (3, sum(sizes) + 1))
            assert (encoder.mask(tensors) == shown[:, :-1]).all() and encoder(tensors).isfinite().all()
            obs, *_ = envs.step(vector.any_actions(envs, obs))


def refusal(tmp_path, capsys, script, **changes):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, script, **changes)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes, fault, says", [
    ([4], "nothing", "forbids every action with the action_mask [0 0 0 0] in environment"),
    ([3, 2], "nothing", "forbids every action with the action_mask [0 0 0 0 0] in environment"),
    ([4], "short", "gives an action_mask of 3 numbers for Discrete(4, start=2); --no-action-mask leaves"),
    ([3, 2], "short", "gives an action_mask of 4 numbers for MultiDiscrete([3 2], start=[1 1]); --no-action"),
    ([4], "missing", "gives an action_mask at some steps and not at others; --no-action-mask leaves"),
])
def test_masks_that_cannot_be_obeyed_are_named(tmp_path, capsys, form, sizes, fault, says):
    import ppo_recurrent_tbb as ppo

    if form.get("as_tuple") and fault != "nothing":
        return
    error = refusal(tmp_path, capsys, ppo, **task("MaskedStranger-v0", sizes=sizes, fault=fault, **form))
    assert f"--env-id MaskedStranger-v0 {says}" in error


@pytest.mark.quick
@every_script
def test_our_own_batches_must_leave_a_choice(script, tmp_path, capsys):
    error = refusal(tmp_path, capsys, script, **task(sizes=[3, 2], gives="zeros"))
    assert "--env-id Masked-v0 forbids every action with the action_mask [0 0 0 0 0] in environment" in error


@pytest.mark.quick
def test_a_branch_without_a_choice_is_refused():
    space = ActionMask(MultiDiscrete([3, 2]))
    masks = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]])
    assert space.leaves_a_choice(masks).tolist() == [True, False, False]
    assert space.first_allowed(masks[:1]).tolist() == [[0, 1]]


@pytest.mark.quick
def test_a_mask_that_comes_later_is_named(tmp_path, capsys):
    import ppo_recurrent_tbb as ppo

    class Later(MaskedStranger):
        def reset(self, **kwargs):
            return super().reset(**kwargs)[0], {}

    gym.registry.pop("Later-v0", None)
    gym.register("Later-v0", Later)
    error = refusal(tmp_path, capsys, ppo, **task("Later-v0", gives="ones"))    # no action is forbidden
    assert "--env-id Later-v0 gives an action_mask at some steps and not at others; --no-action-mask" in error


@pytest.mark.quick
def test_a_box_has_nothing_to_forbid(tmp_path):
    """An action_mask in the infos of such a task is not looked at; as a part of a Dict it is observed."""
    import ppo_recurrent_tbb as ppo

    class Boxed(MaskedStranger):
        def __init__(self, **kwargs):
            super().__init__(gives="ones", **kwargs)
            self.action_space = Box(-1, 1, (2,))

        def step(self, action):
            return super().step(3)

    gym.registry.pop("Boxed-v0", None)
    gym.register("Boxed-v0", Boxed)
    for form, shapes in ((INFO, [(5,)]), (SHOWN, [(4,), (5,)])):
        envs = vector.make_envs(ppo.Args(**task("Boxed-v0", **form)), 3)
        space = envs.single_observation_space
        assert [part.shape for part in leaves(space)] == shapes
        assert Encoder(space).mask_at is None


@pytest.mark.quick
def test_taxi_says_which_moves_lead_somewhere():
    import pqn_recurrent_tbb as pqn

    envs = vector.make_envs(pqn.Args(env_id="Taxi-v4"), 4)
    obs, mask = envs.reset(seed=1)[0]
    assert mask.shape == (4, 6) and (mask[:, 4:].sum(1) <= 1).all()
    for _ in range(50):
        before, actions = obs, vector.any_actions(envs, (obs, mask))
        (obs, mask), rewards, *_ = envs.step(actions)
        assert (rewards > -10).all() and (obs != before).all()


@pytest.mark.quick
def test_nothing_but_a_mask_is_refused():
    with pytest.raises(ValueError, match="nothing but an action_mask"):
        Encoder(Dict(action_mask=ActionMask(Discrete(3))))
