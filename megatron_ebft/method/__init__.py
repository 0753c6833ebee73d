"""What EBFT computes: features, rewards, losses, and the step that is Algorithm 1 of the paper."""
