# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A stand-in for Heretic 2.0, which no package registry has: its names and its life cycle of plugins over Heretic 1.4's model.

It is not Heretic's code, and follows 2.0 in what plugins and commands can notice. Where the two disagree, Heretic is right, and
`tests/upstream` finds out. With the folder above this one in front of the path, `import heretic` finds it instead of the
installed Heretic; the tests of one process use it as `tests.contract.heretic2.heretic`.
"""
