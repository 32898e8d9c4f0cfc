"""What the examples share: data, delays, the four ways to communicate, journals, checkpoints and the closing report.

Nothing here is needed to use torch_qgc. What an example has to say about torch_qgc stands in the example itself.
"""
