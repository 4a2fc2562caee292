# SPDX-License-Identifier: MIT
"""Independent implementations that the library is compared with."""
