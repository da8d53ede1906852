# SPDX-License-Identifier: AGPL-3.0-or-later

"""From residuals to directions (sections 3.1 and 3.2): baselines, self-organizing maps, transforms, files."""
