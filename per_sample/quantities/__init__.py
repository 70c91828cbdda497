"""What can be asked of every sample's gradient of one leaf, without storing it.

One file for each question: a dense default, and the ways of the factors for which structure pays.
"""
