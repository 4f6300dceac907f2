"""
A world model of one's own: the pendulum of Gymnasium, whose physics are known.

    python examples/own_world_model.py

There is nothing to fit, so that the policy learns from the equations of motion alone. A world model that is learnt has its
gradient steps in ``fit`` and takes note of new real steps in ``observe``; see ``sb3_polygrad.world_models.base.WorldModel``.
"""

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_polygrad import PolyGRAD, Trajectory, WorldModel
from sb3_polygrad.world_models.base import PolicyFn


class KnownPendulum(WorldModel):
    differentiable = True  # the policy may follow the gradient of its imagined returns

    def __init__(self, obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int) -> None:
        super().__init__(obs_dim, len(action_low), horizon)
        self.optimizer = th.optim.Adam([th.nn.Parameter(th.zeros(()))])  # PolyGRAD saves the state of an optimiser

    def observe(self, steps: Trajectory) -> None: ...

    def fit(self, segments: Trajectory) -> dict[str, th.Tensor]:
        return {"loss": th.zeros(())}

    def imagine(self, start: th.Tensor, policy: PolicyFn, *, differentiable: bool = False) -> Trajectory:
        observations, actions, rewards = [start], [], []
        with th.set_grad_enabled(differentiable):
            for _ in range(self.horizon):
                actions.append(policy(observations[-1]).rsample())
                angle, speed = th.atan2(observations[-1][:, 1], observations[-1][:, 0]), observations[-1][:, 2]
                torque = actions[-1][:, 0].clamp(-2.0, 2.0)
                rewards.append(-(angle.square() + 0.1 * speed.square() + 0.001 * torque.square()))
                speed = (speed + 0.05 * (15.0 * angle.sin() + 3.0 * torque)).clamp(-8.0, 8.0)
                angle = angle + 0.05 * speed
                observations.append(th.stack([angle.cos(), angle.sin(), speed], dim=1))
            never = th.zeros(len(start), self.horizon, device=start.device)  # no episode ends but by its time limit
            trajectory = th.stack(observations, dim=1), th.stack(actions, dim=1), th.stack(rewards, dim=1)
            return Trajectory(*trajectory, terminals=never, mask=1.0 - never)


def main() -> None:
    model = PolyGRAD("MlpPolicy", "Pendulum-v1", world_model=KnownPendulum, seed=0)
    model.learn(5_000, progress_bar=True)
    mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"Mean return of 20 episodes: {mean:.0f} ± {std:.0f}; of random actions it is about -1200.")


if __name__ == "__main__":
    main()
