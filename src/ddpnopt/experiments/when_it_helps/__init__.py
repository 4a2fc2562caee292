# SPDX-License-Identifier: MIT
"""When the library helps and when it does not: networks, optimizers, rates and depths compared.

`python -m ddpnopt.experiments.when_it_helps` runs what is missing and writes the tables and the
figure of `docs/defaults.md`.
"""
