# SPDX-License-Identifier: MIT
"""Experiments, command line and demo built on the public names of `ddpnopt`.

The library never imports this package. It needs the extra `ddpnopt[experiments]`.
"""
