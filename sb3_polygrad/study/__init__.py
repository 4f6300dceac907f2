"""Studies of world models on stored real steps: errors against the simulator, action statistics, spread, time."""

import gymnasium as gym

gym.register("LinearGaussian-v0", entry_point="sb3_polygrad.study.linear_gaussian:LinearGaussianEnv", max_episode_steps=50)
