import heapq, pytest, contextlib
from sqlalchemy import select, text, String
from sqlalchemy.orm import Session, Mapped, scoped_session, sessionmaker
from iot_models import DeviceState, ShadowService, AsyncShadowService, Report
from test_tmp_guard import e, other, now, K
H=[lambda q:heapq.heappush(q,3),lambda q:heapq.heappop(q),lambda q:heapq.heapify(q),lambda q:heapq.heapreplace(q,9), lambda q: list.append(q,7), lambda q:list.sort(q)]
@pytest.mark.parametrize("i",range(len(H)))
@pytest.mark.parametrize("svc",[0,1,2])
def test_a6(e,i,svc):
    with Session(e) as s:
        d=s.get_one(DeviceState,K); H[i](d.desired_state["queue"]); want=list(d.desired_state["queue"])
        if svc==1: ShadowService(s,"acme").replace_reported("t",{"r":[1]})
        if svc==2: d.status="ONLINE"; s.flush()
        s.commit(); assert now(e)["queue"]==want
        v=d.desired_version; s.commit(); assert d.desired_version==v==1
        d.reported_state["q"]=[3,1]; s.commit(); heapq.heappush(d.reported_state["q"],0); d.status="X"; s.flush(); s.flush(); s.commit(); assert d.reported_state["q"]==[0,1,3]
def test_a3(e):
    reg=scoped_session(sessionmaker(e))
    ShadowService(reg,"acme").patch_desired("t",{"x":1}); reg.commit(); assert now(e)["x"]==1
    with reg.begin_nested(): ShadowService(reg,"acme").patch_desired("t",{"x":2})
    reg.remove()
    for bad in (e, e.connect(), sessionmaker(e), None, "x"):
        with pytest.raises(TypeError, match="session must be") as c: ShadowService(bad,"acme")
        print(c.value)
        if hasattr(bad,"close") : bad.close()
    with pytest.raises(TypeError) as c: AsyncShadowService(Session(e),"acme")
    print(c.value)
def test_a4(e):
    class Machine(DeviceState): firmware: Mapped[str|None]
    with e.begin() as c: c.execute(text("ALTER TABLE device_state ADD firmware text"))
    with Session(e) as s:
        m=s.get_one(Machine,K); d=s.get_one(DeviceState,K)
        ShadowService(s,"acme").patch_desired("t",{"x":1}); assert m.desired_state["x"]==1==d.desired_state["x"]; assert m.desired_version==1
        m.desired_state["y"]=1; s.commit(); d.desired_state["z"]=1; s.flush(); m.desired_state["w"]=1; s.commit(); assert now(e)["w"]==1 and now(e)["z"]==1
        with s.begin_nested() as n:
            ShadowService(s,"acme").patch_desired("t",{"x":9}); n.rollback()
        assert m.desired_state["x"]==1
        m.firmware="1"; s.commit()
