import torch


class RemoteExperienceMaker:
    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
        values, rewards = values * action_mask, rewards * action_mask
        advantages = torch.zeros_like(values)
        length, ahead = values.shape[1], 0.0
        for t in reversed(range(length)):
            next_value = values[:, t + 1] if t + 1 < length else 0.0
            ahead = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lambd * ahead
            advantages[:, t] = ahead
        return advantages, advantages + values

    def get_cumulative_returns(self, rewards, action_mask, gamma):
        rewards, returns, ahead = rewards * action_mask, torch.zeros_like(rewards), 0.0
        for t in reversed(range(rewards.shape[1])):
            ahead = rewards[:, t] + gamma * ahead
            returns[:, t] = ahead
        return returns
