# SPDX-License-Identifier: MIT
"""The benchmark: time, memory and operations of a training step, as ratios to plain SGD."""
