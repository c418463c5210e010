"""Train a student: trajectories of the teacher, the policy's loss, averages, checkpoints."""
