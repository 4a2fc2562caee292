# SPDX-License-Identifier: MIT
"""Image sets from the formats people have on disk and from OpenML: one file per format."""
