# A structure of your own: BTTs with a chosen number of output blocks. Name this file before the other config files:
#   python train.py config/banded.py config/quickstart.py --structure=banded --structure_options="{'bands': 3}"
import math

import theta


def banded(d_in, d_out, options):
    """A full-rank BTT (a 0 1-a 0 1-a a) of about `bands` output blocks."""
    a = math.log(options["bands"]) / math.log(d_out)
    return theta.factor_sizes(d_in, d_out, (a, 0, 1 - a, 0, 1 - a, a, 0), 1)


theta.STRUCTURES["banded"] = theta.Structure(banded, {"bands": 2})
