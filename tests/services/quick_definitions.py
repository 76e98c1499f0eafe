"""The Definitions as they are, but looking every other second, and with a night every minute."""

from orchestration.definitions import build_defs

defs = build_defs(night="* * * * *", tick_s=2)
