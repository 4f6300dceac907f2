"""The policy, the buffer of imagined data, and the policy updates."""
