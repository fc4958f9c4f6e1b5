"""Small inner problems on modules of any kind, as people have them; all data are synthetic.

What a table, an image or a sequence is like is a source (:mod:`tables <metatele.tasks.modules.tables>`, ``images``,
``sequences``); what reads it a network (``networks``); a problem joins them with a way of training (``problem``), and
the distribution draws all three.
"""

from metatele.tasks.modules.data import Data, Source
from metatele.tasks.modules.distribution import Modules
from metatele.tasks.modules.networks import Network, built
from metatele.tasks.modules.problem import CHANGES, Problem

__all__ = ["CHANGES", "Data", "Modules", "Network", "Problem", "Source", "built"]
