# SPDX-License-Identifier: MIT
"""The paper's tables and figures, each by one command, beside the published numbers."""
