"""Song & Choi's experiments (section VI), run with torch_qgc.simulator: see docs/paper.md and run.py."""
