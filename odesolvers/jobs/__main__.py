"""``python -m odesolvers.jobs FOLDER``: one worker of a job."""

from .work import main

main()
