"""The report of one run or of several: one self-contained HTML page."""

from unicl.evaluation.report.contents import Comparison as Comparison
from unicl.evaluation.report.contents import FoundImage as FoundImage
from unicl.evaluation.report.contents import Report as Report
from unicl.evaluation.report.contents import Run as Run
from unicl.evaluation.report.contents import Shown as Shown
from unicl.evaluation.report.contents import TextQuery as TextQuery
from unicl.evaluation.report.writing import render as render
from unicl.evaluation.report.writing import write_report as write_report
