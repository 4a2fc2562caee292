# SPDX-License-Identifier: MIT
"""Variants of the default rule, tried for a better one; none of them is part of the library.

`python -m ddpnopt.experiments.better_rule` runs what is missing and shows how they compare.
"""
