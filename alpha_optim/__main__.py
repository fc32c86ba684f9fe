"""``python -m alpha_optim report | watch | diagnose | compare FILE...``; see `alpha_optim.report.command_line`."""

import sys

from alpha_optim.report.command_line import main

if __name__ == "__main__":
    sys.exit(main())
