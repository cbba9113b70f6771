"""Mixtures of experts outside language models: small systems, each with its dense control.

Each application is a folder with a network, data, a Lightning module and a command line of a few lines; what
they share is :mod:`unimoe.training.application`. The folders do not import one another.
"""
