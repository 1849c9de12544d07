import os
import signal

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

# Small networks on shared machines: a second thread would wait more than it works. Subprocesses read the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The programs leave signals ignored that they find so, as in the background of a script: tests may run there, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class MadeUpGames(VecEnv):
    """What a test's own `VecEnv` need not say: frames of Atari's shape, no attributes, no wrappers, no closing."""

    def __init__(self, num_envs: int, num_actions: int):
        super().__init__(num_envs, gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(num_actions))

    def step_async(self, actions):
        self.actions = actions.copy()

    def close(self):
        pass

    def get_attr(self, attr_name, indices=None):
        return [None] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs
