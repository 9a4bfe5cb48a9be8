"""What `experiments.benchmark` is made of: problems, peers, timing, report and pictures."""
