"""`python -m fastloss`: the command `fastloss`."""

from fastloss.cli import main

raise SystemExit(main())
