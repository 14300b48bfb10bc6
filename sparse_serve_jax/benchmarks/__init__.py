"""What takes how long, and how much of that its bytes need: `timing` measures, `kernels` and `step` are measured.

`endpoint` measures a server from outside.
"""
