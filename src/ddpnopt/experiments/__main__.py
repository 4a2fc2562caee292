# SPDX-License-Identifier: MIT
"""`python -m ddpnopt.experiments` is the command `ddpnopt`."""

from ddpnopt.experiments.cli import main

if __name__ == "__main__":
    main()
