"""What CleanRL, Stable-Baselines3 and its RL Zoo call a flag, and what it is here.

A line holds words of theirs and what to use instead; where scripts differ several answers, of which a script
gives the first whose flags it has. A word that is a flag of the script itself is never looked up.
"""
import dataclasses
import re
import sys

from models.command_line import fail

OURS = {
    # the task and the run
    "env env-name gym-id": ["--env-id"],
    "exp-name exp-id log-name": ["--run-name"],
    "tensorboard-log tb log-folder f folder": ["--runs-dir"],
    "trained-agent i load-checkpoint load-last-checkpoint": ["--resume, or --model to watch it"],
    "load-best enjoy render no-render": ["--model and --render-mode"],
    "deterministic stochastic": ["--model, which plays the most likely actions"],
    "algo policy": ["choose the script of the algorithm, and --memory"],
    "n n-timesteps timesteps num-updates num-iterations num-frames num-env-steps": ["--total-timesteps"],
    "n-envs vec-env num-workers": ["--num-envs, stepped in one process"],
    "cuda no-cuda gpu use-gpu": ["--device cuda or --device cpu"],
    "device-ids": ["--device cuda:1, or ppo_recurrent_tbb_multigpu.py under torchrun"],
    "torch-deterministic": ["--seed, which fixes all numbers on a machine"],
    "save-model save-replay-buffer": ["every run saves what --model and --resume need"],
    "save-freq save-interval checkpoint-freq": ["--checkpoint-every"],
    "upload-model hf-entity hub-id": ["share the model.safetensors that every run saves"],
    "eval-freq": ["--eval-every"],
    "n-eval-episodes num-eval-episodes": ["--eval-episodes"],
    "eval-env-kwargs": ["--eval-reset-options, of resets; constructors get --env-kwargs"],
    "record-video video": ["--capture-video"],
    "verbose progress p log-interval": ["every run shows its progress and logs to TensorBoard"],
    "hyperparams params hyperparameters": ["give each its own flag, or --flags and a file"],
    "conf-file conf config": ["--flags"],
    "optimize optimize-hyperparameters n-trials sampler pruner storage study-name": [
        "benchmark/tune.py searches"],
    # the network
    "policy-kwargs net-arch": ["--encoder-size, --hidden-size and --mlp-size"],
    "lstm-hidden-size rnn-hidden-size trxl-dim": ["--hidden-size"],
    "n-lstm-layers rnn-num-layers trxl-num-layers": ["--num-layers"],
    "trxl-memory-length": ["--memory gpt and its window in --memory-kwargs"],
    "recurrent use-rnn rnn-type": ["--memory"],
    "normalize vec-normalize": ["--norm-obs and --norm-reward"],
    # schedules
    "lr learning-rate policy-lr q-lr init-lr": ["--learning-rate", "--policy-lr and --q-lr"],
    "anneal-lr no-anneal-lr final-lr anneal-steps lr-schedule": [
        "--learning-rate 2e-3 0, a schedule from 2e-3 to 0", "--policy-lr 1e-3 0 and --q-lr 1e-3 0, to 0"],
    "ent-coef init-ent-coef final-ent-coef entropy-coef": ["--ent-coef", "--alpha"],
    "exploration-initial-eps": ["--start-e"],
    "exploration-final-eps": ["--end-e"],
    # PPO
    "n-steps": ["--num-steps", "--n-step"],
    "seq-len sequence-length": ["--seq-len", "--tape-len", "--num-steps; the tape has no segments"],
    "n-epochs ppo-epoch num-epochs": ["--update-epochs", "--replay-ratio, in gradient steps per step"],
    "batch-size minibatch-size n-minibatches num-mini-batch nminibatches": [
        "--num-minibatches", "--batch-size", "--tape-len"],
    "clip-range clip-param clip-range-vf": ["--clip-coef"],
    "normalize-advantage": ["--norm-adv"],
    "vf-coef value-loss-coef": ["--vf-coef"],
    "lam gae-lambda": ["--gae-lambda", "--q-lambda"],
    # replay
    "train-freq train-frequency update-frequency": ["--train-every", "--num-steps"],
    "gradient-steps utd-ratio": ["--replay-ratio, in gradient steps per environment step"],
    "target-update-interval": ["--target-network-frequency"],
    "polyak": ["--tau"],
    "autotune": ["--target-entropy, which tunes --alpha"],
    "target-entropy-scale": ["--target-entropy"],
    "policy-delay": ["--policy-frequency"],
    "action-noise": ["--exploration-noise"],
    "target-policy-noise": ["--policy-noise"],
    "target-noise-clip": ["--noise-clip"],
}
THEIRS = {word: answers for words, answers in OURS.items() for word in words.split()}
YES_OR_NO = "true", "false", "yes", "no", "1", "0"


def refuse_words_of_others(Args, argv=None):
    """One sentence for all of them, in place of "unrecognized"."""
    own = {field.name.replace("_", "-"): field.type for field in dataclasses.fields(Args)}
    argv, said = sys.argv[1:] if argv is None else argv, []
    for word, following in zip(argv, [*argv[1:], ""]):
        name = word.lstrip("-").split("=")[0].replace("_", "-")
        if not word.startswith("-"):
            continue
        if own.get(name) is bool and following.lower() in YES_OR_NO:
            said.append(f"--{name} {following}: write --{name} or --no-{name}")
        elif name not in own:
            answer = answer_of(name.lower(), own)
            said += [f"{word.split('=')[0]} is not a flag here: {answer}"] if answer else []
    if said:
        fail("; ".join(said))


def answer_of(word, own):
    """The first answer whose flags the script has."""
    for answer in THEIRS.get(word, ()):
        if all(flag in own for flag in re.findall(r"--([a-z-]+)", answer)):
            return f"use {answer}" if answer.startswith("--") else answer
