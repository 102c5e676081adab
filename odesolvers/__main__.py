"""``python -m odesolvers``, the command line."""

from odesolvers_command import main

main()
