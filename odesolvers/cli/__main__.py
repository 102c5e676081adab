"""``python -m odesolvers.cli``"""

from . import main

main()
